"""The starter file of each task validates as it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from eagleray.config.loader import load_files
from eagleray.config.schema import BUILTIN_TASKS
from eagleray.config.starter import write_starter
from eagleray.errors import UsageError


@pytest.mark.parametrize("task", [*BUILTIN_TASKS, "my_models.core:Task"])
def test_a_starter_file_is_valid_without_warnings_and_named_after_its_file(tmp_path: Path, task: str) -> None:
    (tmp_path / "my_models").mkdir()
    path = tmp_path / "My First.yaml"
    write_starter(path, task)
    (loaded,) = load_files([path])
    assert (loaded.config.task, loaded.config.name, loaded.warnings) == (task, "my-first", ())


def test_a_starter_file_overwrites_nothing(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("mine")
    with pytest.raises(UsageError, match=r"mine\.yaml exists already"):
        write_starter(path, "translation")
    assert path.read_text() == "mine"


def test_an_unknown_task_is_refused_before_a_file_is_made(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no task summarise"):
        write_starter(tmp_path / "a.yaml", "summarise")
    assert list(tmp_path.iterdir()) == []
