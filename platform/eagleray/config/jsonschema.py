"""The JSON schema of the file, for editors: what `configs/eagleray.schema.json` holds."""

from __future__ import annotations

from typing import Any

from eagleray.config.families import FAMILIES
from eagleray.config.problems import spellings
from eagleray.config.schema import ParallelConfig, RunConfig


def file_schema() -> dict[str, Any]:
    """Return the JSON schema of the file, its aliases and the settings of every model family included."""
    schema = RunConfig.model_json_schema()
    definitions = schema["$defs"]
    _add_spellings(definitions["ParallelConfig"])
    branches = []
    for name, family in sorted(FAMILIES.items()):
        own = family.model_json_schema(ref_template=f"#/$defs/{name}.{{model}}")
        definitions.update({f"{name}.{key}": value for key, value in own.pop("$defs", {}).items()})
        definitions[f"family.{name}"] = own
        branches.append(
            {
                "if": {"properties": {"family": {"const": name}}, "required": ["family"]},
                "then": {"properties": {"config": {"$ref": f"#/$defs/family.{name}"}}},
            }
        )
    definitions["ModelConfig"]["allOf"] = branches
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _add_spellings(section: dict[str, Any]) -> None:
    properties = section["properties"]
    for spelling, name in spellings(ParallelConfig).items():
        properties.setdefault(spelling, {**properties[name], "title": f"Same as {name}"})
