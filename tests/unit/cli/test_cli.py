"""The conventions that every verb shares, through the command as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from eagleray import __version__
from eagleray.cli import ORDER, build_app

FILE = """\
name: en-fr
task: translation
model: {family: marian}
data: {source: cldr-en-fr}
train: {max_steps: 10}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text(FILE)
    return path


def eagleray(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eagleray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


HEAVY = ["ray", "torch", "transformers", "numpy", "pyarrow", "fastapi", "obstore"]


@pytest.mark.parametrize(
    "arguments, heavy", [(["--help"], [*HEAVY, "pydantic"]), (["validate", "file.yaml"], HEAVY)]
)
def test_a_light_verb_imports_nothing_heavy(arguments: list[str], heavy: list[str], file: Path) -> None:
    code = (
        "import sys, eagleray.cli\n"
        "try:\n"
        f"    eagleray.cli.main({arguments})\n"
        "except SystemExit as end:\n"
        "    assert end.code == 0, end.code\n"
        f"print([name for name in {heavy} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=file.parent
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_json_is_the_last_line_of_standard_output(file: Path) -> None:
    done = eagleray("validate", file, "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout.splitlines()[-1])["files"][0]["config"]["name"] == "en-fr"


def test_an_error_is_a_message_without_a_traceback_unless_verbose(tmp_path: Path) -> None:
    done = eagleray("validate", tmp_path / "none.yaml")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"error: {tmp_path}/none.yaml: cannot be read: No such file or directory\n"
    assert "Traceback" in eagleray("validate", tmp_path / "none.yaml", "--verbose").stderr


def test_a_misspelt_verb_suggests_the_nearest() -> None:
    done = eagleray("validat", "x.yaml")
    assert done.returncode == 2
    assert "error: No such command 'validat'. Did you mean 'validate'" in done.stderr


def test_a_wrong_call_is_one_object_with_json() -> None:
    done = eagleray("validate", "--jsn", "--json")
    assert done.returncode == 2
    said = json.loads(done.stdout)["error"]
    assert said["code"] == "usage"
    assert said["message"].startswith("No such option: --jsn")


def test_the_version_is_that_of_the_package() -> None:
    done = eagleray("--version")
    assert (done.returncode, done.stdout) == (0, f"eagleray {__version__}\n")


def test_a_call_without_a_verb_shows_the_verbs_in_the_order_of_the_journey() -> None:
    done = eagleray()
    assert done.returncode == 2
    verbs = [line.split()[0] for line in done.stderr.split("Commands:\n")[1].splitlines() if line.strip()]
    known = [verb for verb in ORDER if verb in verbs]
    assert verbs[: len(known)] == known
    assert {"init", "validate", "models", "store", "jobs", "doctor"} <= set(verbs)


def test_every_verb_explains_itself_and_has_json() -> None:
    found: dict[str, Any] = {}
    for name, command in get_command(build_app()).commands.items():  # type: ignore[attr-defined]
        below = {f"{name} {verb}": each for verb, each in getattr(command, "commands", {}).items()}
        found |= below or {name: command}
    assert len(found) >= 23
    assert [name for name, verb in found.items() if not verb.help] == []
    options = {name: {parameter.name for parameter in verb.params} for name, verb in found.items()}
    assert [name for name in options if not {"json", "verbose"} <= options[name]] == []
