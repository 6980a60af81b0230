"""The two channels, the errors and the exit statuses of a verb."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from eagleray.console import group, reporting, store_location, table
from eagleray.errors import CheckpointDamagedError, ConfigError, EaglerayError, InterruptedRunError


def test_the_result_is_text_for_people_and_one_object_with_json(capsys: pytest.CaptureFixture[str]) -> None:
    for as_json, printed in [(False, "two\n"), (True, '{"n": 2, "path": "/a"}\n')]:
        with reporting(json=as_json) as out:
            out.result({"n": 2, "path": Path("/a")}, "two")
        assert capsys.readouterr().out == printed


LOUD = """
import os
from eagleray.console import reporting
with reporting(json=True) as out:
    print("a library")
    os.system("echo a child")
    out.note("a note")
    out.warn("something")
    out.result({"n": 1})
print("after")
"""


def test_with_json_everything_else_goes_to_standard_error_also_of_child_processes() -> None:
    done = subprocess.run([sys.executable, "-c", LOUD], capture_output=True, text=True, timeout=60)
    assert done.stdout == '{"n": 1}\nafter\n'
    assert sorted(done.stderr.splitlines()) == ["a child", "a library", "a note", "warning: something"]


@pytest.mark.parametrize(
    "error, status, code, first_line",
    [
        (ConfigError("the file is wrong", "Mend it."), 2, "config", "error: the file is wrong"),
        (CheckpointDamagedError("a bit flipped"), 1, "checkpoint_damaged", "error: a bit flipped"),
        (InterruptedRunError("committed", 15), 143, "interrupted_run", "error: committed"),
        (InterruptedRunError("committed", 2), 130, "interrupted_run", "error: committed"),
        (KeyboardInterrupt(), 130, "interrupted", "error: interrupted"),
        (SystemExit(143), 143, "interrupted", "error: interrupted by SIGTERM"),
    ],
)
def test_an_error_is_a_message_a_hint_and_a_status(
    capsys: pytest.CaptureFixture[str], error: BaseException, status: int, code: str, first_line: str
) -> None:
    with pytest.raises(typer.Exit) as end, reporting(json=True):
        raise error
    captured = capsys.readouterr()
    assert end.value.exit_code == status
    assert captured.err.splitlines()[0] == first_line
    assert "Traceback" not in captured.err
    said = json.loads(captured.out)["error"]
    assert (said["code"], said["message"]) == (code, first_line.removeprefix("error: "))
    assert said["hint"] == getattr(error, "hint", None)


def test_an_unexpected_error_keeps_its_traceback_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as end, reporting():
        raise ZeroDivisionError("by zero")
    said = capsys.readouterr().err
    assert end.value.exit_code == 1
    assert said.count("Traceback") == 1
    assert "error: ZeroDivisionError: by zero" in said
    assert "hint: this is a fault of eagleray" in said


def test_a_status_of_its_own_passes_through() -> None:
    with pytest.raises(typer.Exit) as end, reporting():
        raise typer.Exit(1)
    assert end.value.exit_code == 1


def test_an_error_prints_its_traceback_when_verbose(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit), reporting(verbose=True):
        raise EaglerayError("no")
    assert "Traceback" in capsys.readouterr().err


def test_verbs_of_several_packages_share_a_group() -> None:
    app = typer.Typer()
    assert group(app, "models", "Models.") is group(app, "models", "Models.")
    assert group(app, "store", "Store.") is not group(app, "models", "Models.")


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert table(("A", "LONG"), [("wide", 1), ("x", "y")]) == "A     LONG\nwide  1\nx     y"


def test_the_store_of_a_verb_without_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EAGLERAY_STORE", raising=False)
    assert store_location(None) == "./store"
    monkeypatch.setenv("EAGLERAY_STORE", "s3://b/p")
    assert store_location(None) == "s3://b/p"
    assert store_location("here") == "here"


def test_a_reader_that_leaves_early_sees_no_traceback(tmp_path: Path) -> None:
    command = f"{sys.executable} -m eagleray.cli validate --schema | head -c 1"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60)
    assert done.stdout == "{"
    assert done.stderr == ""
