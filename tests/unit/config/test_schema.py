"""What every field of the file has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from eagleray.config.families import FAMILIES
from eagleray.config.problems import section_at
from eagleray.config.schema import ModelConfig, RunConfig


def sections(root: type[BaseModel]) -> Iterator[type[BaseModel]]:
    yield root
    for name in root.model_fields:
        inner = section_at(root, [name])
        if inner is not None:
            yield from sections(inner)


ALL_SECTIONS = list(dict.fromkeys([*sections(RunConfig), *FAMILIES.values()]))


def test_the_sections_are_found() -> None:
    assert len(ALL_SECTIONS) == 19


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=lambda section: section.__name__)
def test_every_field_is_described_and_every_number_bounded(section: type[BaseModel]) -> None:
    for name, info in section.model_fields.items():
        assert info.description, f"{section.__name__}.{name}"
    for name, schema in section.model_json_schema()["properties"].items():
        for kind in numbers_in(schema):
            bounds = {"minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum"}
            assert bounds & set(kind), f"{section.__name__}.{name} has no bound"


def numbers_in(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for kind in schema.get("anyOf", [schema]):
        if kind.get("type") in ("integer", "number") and "enum" not in kind and "const" not in kind:
            yield kind


@pytest.mark.parametrize("section", ALL_SECTIONS, ids=lambda section: section.__name__)
def test_every_section_is_strict_and_frozen(section: type[BaseModel]) -> None:
    settings = section.model_config
    assert settings["extra"] == "forbid" and settings["strict"] and settings["frozen"]
    assert settings["allow_inf_nan"] is False


def test_a_value_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        ModelConfig(family="marian").family = "bert"  # type: ignore[misc]
