"""What lies in configs/: every file loads, and the schema for editors is current."""

from __future__ import annotations

import json
from pathlib import Path

from eagleray.config.jsonschema import file_schema
from eagleray.config.loader import load_files

CONFIGS = Path(__file__).parents[3] / "configs"
NUM_FILES = 5


def test_every_shipped_file_loads_without_warnings() -> None:
    found = sorted(CONFIGS.rglob("*.yaml"))
    assert len(found) == NUM_FILES, found
    for path in found:
        (loaded,) = load_files([path], environ={})
        assert loaded.warnings == (), path
        assert path.read_text().startswith("# yaml-language-server: $schema="), path


def test_the_schema_for_editors_is_current() -> None:
    committed = json.loads((CONFIGS / "eagleray.schema.json").read_text())
    assert committed == file_schema(), "run: eagleray validate --schema > configs/eagleray.schema.json"


def test_the_schema_describes_every_key_and_knows_both_spellings_and_the_families() -> None:
    schema = file_schema()
    definitions = schema["$defs"]
    for name, section in definitions.items():
        for key, value in section.get("properties", {}).items():
            assert "description" in value or "$ref" in value, f"{name}.{key}"
    assert "dp_replicate_size" in definitions["ParallelConfig"]["properties"]
    assert "d_model" in definitions["family.marian"]["properties"]
    assert len(definitions["ModelConfig"]["allOf"]) == 5
