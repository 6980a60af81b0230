"""The reference of the file, for people: what `docs/configuration.md` holds between its two marks."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eagleray.config.jsonschema import file_schema

BEGIN = "<!-- begin: written by eagleray.config.reference, held current by a test -->"
END = "<!-- end -->"
_SECTIONS = ("model", "data", "train", "parallel", "resources", "serve")
_BOUNDS = (("minimum", ">= {}"), ("exclusiveMinimum", "> {}"), ("maximum", "<= {}"), ("exclusiveMaximum", "< {}"))


def render_reference() -> str:
    """Return a table of keys, types, defaults and meanings for every section of the file, as Markdown."""
    schema = file_schema()
    definitions: Mapping[str, Any] = schema["$defs"]
    parts = [_table("The file", schema, definitions)]
    for name in _SECTIONS:
        parts.append(_table(f"`{name}`", _section(schema["properties"][name], definitions), definitions))
    for name in sorted(key for key in definitions if key.startswith("family.")):
        parts.append(_table(f"`model.config` of `{name.removeprefix('family.')}`", definitions[name], definitions))
    return "\n\n".join(parts)


def _table(title: str, section: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    rows = [
        f"| `{key}` | {kind} | {default} | {text} |" for key, kind, default, text in _rows(section, definitions)
    ]
    return "\n".join([f"## {title}", "", "| key | type | default | meaning |", "|---|---|---|---|", *rows])


def _rows(section: Mapping[str, Any], definitions: Mapping[str, Any]) -> Iterator[tuple[str, str, str, str]]:
    """Yield key, type, default and meaning of each setting."""
    required = section.get("required", ())
    for key, value in section["properties"].items():
        if value.get("title", "").startswith("Same as"):
            continue  # an accepted alias
        inner = _section(value, definitions)
        kind = "section" if "properties" in inner else _kind(value, definitions)
        default = "required" if key in required else _default(value)
        yield key, kind, default, value.get("description") or inner.get("description", "")
        if "properties" in inner and key not in _SECTIONS:
            yield from ((f"{key}.{sub}", k, d, t) for sub, k, d, t in _rows(inner, definitions))


def _section(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object that a property holds, or nothing where it is a plain value or one of several kinds."""
    options = [option for option in value.get("anyOf", [value]) if option.get("type") != "null"]
    if len(options) == 1 and "$ref" in options[0]:
        found: Mapping[str, Any] = definitions[options[0]["$ref"].removeprefix("#/$defs/")]
        return found
    return {}


def _kind(value: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    if "$ref" in value:
        return _object(definitions[value["$ref"].removeprefix("#/$defs/")])
    if "anyOf" in value:
        return " or ".join(_kind(option, definitions) for option in value["anyOf"] if option.get("type") != "null")
    if "enum" in value or "const" in value:
        return ", ".join(f"`{choice}`" for choice in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"list of {_kind(value.get('items', {}), definitions)}"
    bounds = [text.format(value[key]) for key, text in _BOUNDS if key in value]
    return " ".join([value.get("type", "any"), *bounds])


def _object(definition: Mapping[str, Any]) -> str:
    return f"{{{', '.join(definition['properties'])}}}"


def _default(value: Mapping[str, Any]) -> str:
    default = value.get("default")
    return "" if default is None else f"`{json.dumps(default)}`"


def write_reference(document: Path) -> None:
    """Replace what stands between the two marks of a document."""
    text = document.read_text()
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    document.write_text(f"{before}\n\n{render_reference()}\n\n{after}")


if __name__ == "__main__":
    write_reference(Path(sys.argv[1]))
