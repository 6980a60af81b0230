"""What travels to a cluster."""

from __future__ import annotations

from importlib.metadata import PathDistribution
from pathlib import Path

import pytest

from eagleray.errors import ConfigError
from eagleray.shipping import code_modules, unpack_wheel
from eagleray.user_code import python_paths


def test_an_unpacked_wheel_holds_the_packages_and_the_metadata_that_names_the_verbs(tmp_path: Path) -> None:
    folders = unpack_wheel(tmp_path)
    assert [folder.name for folder in folders[:3]] == ["eagleray", "eagleray_jobs", "eagleray_serving"]
    verbs = PathDistribution(folders[3]).entry_points.select(group="eagleray.commands")
    assert {verb.name for verb in verbs} == {"platform", "jobs", "serving"}
    assert not list(tmp_path.rglob("*.pyc"))
    assert (tmp_path / "eagleray" / "py.typed").exists()


def test_a_directory_of_packages_ships_each_of_them_and_is_a_path_entry_itself(tmp_path: Path) -> None:
    for name in ("first", "second", "not-a-module"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "single.py").touch()
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in code_modules([str(tmp_path)])] == ["first", "second", "single.py"]
    assert python_paths([str(tmp_path)]) == [str(tmp_path)]


def test_a_package_itself_ships_alone_and_its_parent_is_the_path_entry(tmp_path: Path) -> None:
    package = tmp_path / "mine"
    package.mkdir()
    (package / "__init__.py").touch()
    (tmp_path / "other.py").touch()
    assert code_modules([str(package)]) == [package]
    assert python_paths([str(package)]) == [str(tmp_path)]


def test_code_that_is_missing_or_empty_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere' is not a directory"):
        python_paths([str(tmp_path / "nowhere")])
    with pytest.raises(ConfigError, match="holds no Python package"):
        code_modules([str(tmp_path)])
