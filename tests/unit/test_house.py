"""The layout of the repository itself."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("folder", ["platform", "jobs", "serving", "tests", "tests/platform"])
def test_a_source_folder_is_no_package_because_it_would_hide_the_standard_library(folder: str) -> None:
    assert not (ROOT / folder / "__init__.py").exists()


@pytest.mark.parametrize(
    "folder, package", [("platform", "eagleray"), ("jobs", "eagleray_jobs"), ("serving", "eagleray_serving")]
)
def test_each_source_folder_holds_exactly_one_package(folder: str, package: str) -> None:
    found = {path.parent.name for path in (ROOT / folder).glob("*/__init__.py")}
    assert found == {package}


def test_every_entry_point_of_the_command_line_can_be_loaded() -> None:
    from importlib.metadata import entry_points

    verbs = entry_points(group="eagleray.commands")
    assert {verb.name for verb in verbs} == {"platform", "jobs", "serving"}
    for verb in verbs:
        assert callable(verb.load())


def test_every_module_that_tests_import_by_its_bare_name_has_a_name_of_its_own() -> None:
    # Of two tests with one name, the second ends the whole collection; a helper and a benchmark with one name hide
    # each other, and which of them wins depends on the folder that was collected first.
    modules = [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    names = Counter(path.stem for path in modules if path.stem not in ("conftest", "__init__"))
    assert [name for name, count in names.items() if count > 1] == []
