"""Finding the user's own code of a version that was trained on another machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray_jobs.answering import find_code

REF = "mine@r1-step-00000010"


@pytest.fixture(autouse=True)
def import_path() -> Iterator[None]:
    before = list(sys.path)
    yield
    sys.path[:] = before
    sys.modules.pop("counted_words", None)


def trained_with(code: str) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "mine",
            "task": "counted_words:Words",
            "code": [code],
            "model": {"factory": "counted_words:build"},
            "data": {"train": "/rows.jsonl"},
        }
    )


def write_code(folder: Path, text: str = "class Words: ...\ndef build(): ...\n") -> Path:
    folder.mkdir()
    (folder / "counted_words.py").write_text(text)
    return folder


def test_code_of_another_machine_is_missed_by_name_with_the_option_that_brings_it() -> None:
    with pytest.raises(ConfigError) as raised:
        find_code(REF, trained_with("/elsewhere/code"), [])
    assert raised.value.message.startswith(
        f"{REF} needs code of its own: task: counted_words:Words: cannot import"
    )
    assert raised.value.hint == (
        "Name the directory that holds counted_words with --code DIR; "
        f"when {REF} was trained it was in /elsewhere/code."
    )


def test_a_directory_that_is_named_takes_the_place_of_the_one_in_training(tmp_path: Path) -> None:
    here = write_code(tmp_path / "here")
    assert find_code(REF, trained_with("/elsewhere/code"), [str(here)]).code == [str(here)]
    assert "counted_words" in sys.modules


def test_code_that_lies_where_it_was_in_training_needs_no_option(tmp_path: Path) -> None:
    here = write_code(tmp_path / "here")
    assert find_code(REF, trained_with(str(here)), []).code == [str(here)]


def test_other_code_of_the_same_name_is_told_by_what_it_lacks(tmp_path: Path) -> None:
    here = write_code(tmp_path / "here", "class Words: ...\n")
    with pytest.raises(ConfigError, match=r"model\.factory: counted_words:build: .* has no build"):
        find_code(REF, trained_with("/elsewhere/code"), [str(here)])


def test_a_directory_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match="'/nowhere' is not a directory"):
        find_code(REF, trained_with("/elsewhere/code"), ["/nowhere"])
