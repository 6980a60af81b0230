"""Turn what pydantic says about a value into what a user can act on."""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import AliasChoices, BaseModel
from pydantic_core import ErrorDetails

from eagleray.config.document import KeyPath

MAX_SHOWN_CHARACTERS = 60

_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "dict_type": "a section",
    "model_type": "a section",
    "model_attributes_type": "a section",
    "finite_number": "a finite number",
    "none_required": "null",
}
_LIMITS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "string_too_short": "text of at least {min_length} character",
    "string_too_long": "text of at most {max_length} characters",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "text that matches {pattern}",
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong, at one key.

    Attributes:
        key: Path of the key, from the top of the file.
        message: What is wrong and what would be right.
    """

    key: KeyPath
    message: str


def explain(
    errors: Iterable[ErrorDetails], root: type[BaseModel], document: Any, at: KeyPath = ()
) -> list[Problem]:
    """Turn validation errors into one problem per key, in the order they were found.

    Args:
        errors: What `ValidationError.errors()` gave.
        root: The class that was validated.
        document: The plain values that were validated.
        at: Where those values stand in the file.
    """
    by_key: dict[KeyPath, list[ErrorDetails]] = {}
    for error in errors:
        by_key.setdefault(_key_of(error, document), []).append(error)
    # Where a member of a union went on deeper, the other members' complaints about the whole are noise.
    deepest = [key for key in by_key if not any(other[: len(key)] == key != other and key for other in by_key)]
    return [Problem((*at, *key), _message(key, by_key[key], root, at)) for key in deepest]


def section_at(root: type[BaseModel], key: Sequence[str | int]) -> type[BaseModel] | None:
    """Return the section class that stands at a key, if a section stands there."""
    section: type[BaseModel] | None = root
    for part in key:
        found = section.model_fields.get(str(part)) if section is not None else None
        section = _section_in(found.annotation) if found is not None else None
    return section


def spellings(section: type[BaseModel]) -> dict[str, str]:
    """Return every key that a section accepts, with the field it sets."""
    names: dict[str, str] = {}
    for name, info in section.model_fields.items():
        names[name] = name
        if isinstance(info.validation_alias, AliasChoices):
            names.update({str(choice): name for choice in info.validation_alias.choices})
    return names


def unknown_key(key: KeyPath, section: type[BaseModel] | None) -> str:
    """Say that a key of a section is unknown, which one is nearest, and which are valid."""
    where = dotted(key[:-1]) or "the file"
    message = f"{dotted(key)} is not a key of {where}"
    if section is None:
        return message
    valid = spellings(section)
    near = difflib.get_close_matches(str(key[-1]), valid, n=1, cutoff=0.6)
    if near:
        message += f"; did you mean {near[0]}?"
    return f"{message}\n  valid keys of {where}: {', '.join(sorted(section.model_fields))}"


def dotted(key: Sequence[str | int]) -> str:
    """Write a key as `train.max_steps`."""
    return ".".join(str(part) for part in key)


def shown(value: Any) -> str:
    """Write a value shortly, as it may stand in a file."""
    try:
        text = json.dumps(value, ensure_ascii=True)
    except (TypeError, ValueError):
        text = repr(value)
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[: MAX_SHOWN_CHARACTERS - 3] + "..."


def _section_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType, Annotated):
        return next((found for part in get_args(annotation) if (found := _section_in(part))), None)
    return None


def _key_of(error: ErrorDetails, document: Any) -> KeyPath:
    """Drop what pydantic puts into a location besides keys: the names of a union's members."""
    value, key = document, []
    location = error["loc"]
    for i, part in enumerate(location):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, list) and isinstance(part, int) and part < len(value):
            value = value[part]
        elif error["type"] == "missing" and i == len(location) - 1:
            pass
        else:
            continue
        key.append(part)
    return tuple(key)


def _message(key: KeyPath, errors: list[ErrorDetails], root: type[BaseModel], at: KeyPath) -> str:
    first, name = errors[0], dotted((*at, *key))
    kinds = {error["type"] for error in errors}
    if kinds == {"extra_forbidden"}:
        return unknown_key((*at, *key), section_at(root, key[:-1]))
    if kinds == {"missing"}:
        info = (section_at(root, key[:-1]) or root).model_fields.get(str(key[-1]))
        return f"{name} is missing" + (f": {info.description}" if info and info.description else "")
    if first["type"] in ("value_error", "assertion_error"):
        text = str(first.get("ctx", {}).get("error") or first["msg"])
        return f"{name}: {text}" if name else text
    expected = list(dict.fromkeys(_expected(error) for error in errors if error["type"] != "missing"))
    return f"{name or 'the file'} is {shown(first['input'])}, but must be {' or '.join(expected)}"


def _expected(error: ErrorDetails) -> str:
    kind = error["type"]
    if kind in _EXPECTED:
        return _EXPECTED[kind]
    if kind in _LIMITS:
        return _LIMITS[kind].format(**error.get("ctx", {}))
    return error["msg"].removeprefix("Input should be ")
