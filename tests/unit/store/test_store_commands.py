"""`eagleray models` and `eagleray store`, in this process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from versions_made import commit

from eagleray.cli import main
from eagleray.store.objects import ObjectStore

Run = Callable[..., tuple[int, dict[str, Any]]]
FIRST, SECOND = "r1-step-00000010", "r1-step-00000020"


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    store = ObjectStore.open(str(tmp_path / "store"))
    commit(store, 10, bleu=50.0)
    commit(store, 20, bleu=40.0)
    return store


@pytest.fixture
def run(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> Run:
    def run_verb(*arguments: str) -> tuple[int, dict[str, Any]]:
        with pytest.raises(SystemExit) as end:
            main([*arguments, "--store", store.location, "--json"])
        last = capsys.readouterr().out.splitlines()[-1]
        assert isinstance(end.value.code, int)
        return end.value.code, json.loads(last)

    return run_verb


def test_models_and_their_versions_are_listed_with_scores(run: Run) -> None:
    status, listed = run("models", "list")
    assert (status, listed["models"]) == (
        0,
        [{"name": "en-fr", "versions": 2, "latest": f"en-fr@{SECOND}", "best": FIRST}],
    )
    _, listed = run("models", "list", "en-fr")
    assert [(each["ref"], each["metrics"]) for each in listed["versions"]] == [
        (f"en-fr@{FIRST}", {"bleu": 50.0}),
        (f"en-fr@{SECOND}", {"bleu": 40.0}),
    ]


def test_whoever_only_looks_at_versions_does_without_torch(store: ObjectStore, tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_text("{name: en-fr, task: translation, model: {family: marian}, data: {source: cldr-en-fr}}")
    calls = (
        ["models", "list"], ["models", "show", "en-fr"], ["models", "verify", "en-fr"], ["store", "sweep"],
        ["models", "alias", "en-fr", "production", "en-fr@latest"], ["serve", "render", str(file)],
    )  # fmt: skip
    code = (
        "import sys, eagleray.cli\n"
        f"for call in {calls}:\n"
        "    try:\n"
        f"        eagleray.cli.main([*call, '--store', {store.location!r}])\n"
        "    except SystemExit as end:\n"
        "        assert end.code == 0, (call, end.code)\n"
        "    assert not {'torch', 'ray', 'transformers'} & set(sys.modules), call\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_version_is_shown_with_its_files(run: Run) -> None:
    _, shown = run("models", "show", "en-fr")
    assert shown["ref"] == f"en-fr@{FIRST}"
    assert any(each["path"].endswith("/config.json") for each in shown["files"])
    assert shown["versions"]["torch"]


def test_a_whole_version_is_verified_and_a_damaged_one_ends_with_status_1_naming_the_file(
    run: Run, store: ObjectStore
) -> None:
    assert run("models", "verify", "en-fr@best") == (
        0,
        {"ref": f"en-fr@{FIRST}", "whole": True, "problems": []},
    )
    weights = next(info.key for info in store.list(f"models/en-fr/{FIRST}") if "/model-" in info.key)
    path = store.local_path(weights)
    assert path is not None
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    status, found = run("models", "verify", "en-fr@best")
    assert status == 1 and found["whole"] is False
    assert [problem["key"] for problem in found["problems"]] == [weights]


def test_an_alias_is_set_rolled_back_and_removed_and_its_history_stays(run: Run) -> None:
    run("models", "alias", "en-fr", "production", "best", "--note", "first")
    _, shown = run("models", "alias", "en-fr", "production", "en-fr@latest")
    assert shown["ref"] == f"en-fr@{SECOND}"
    _, shown = run("models", "alias", "en-fr", "production", "--rollback")
    assert shown["ref"] == f"en-fr@{FIRST}"
    _, shown = run("models", "alias", "en-fr", "production", "--remove")
    assert shown["ref"] is None
    assert [(each["version"], each["note"]) for each in shown["history"]] == [
        (FIRST, "first"),
        (SECOND, ""),
        (FIRST, "rollback"),
        (None, ""),
    ]


def test_the_ways_to_change_an_alias_exclude_each_other(run: Run) -> None:
    status, said = run("models", "alias", "en-fr", "production", "best", "--rollback")
    assert status == 2
    assert said["error"]["message"] == "a REF, --rollback and --remove exclude each other"


def test_what_is_not_there_is_named_with_what_is(run: Run) -> None:
    status, said = run("models", "show", "en-de")
    assert status == 1
    assert said["error"]["code"] == "not_found"
    assert said["error"]["hint"] == "Models there: en-fr."
    assert run("models", "list", "en-de")[0] == 1


def test_a_sweep_says_what_it_would_remove_and_leaves_versions_alone(run: Run, store: ObjectStore) -> None:
    store.put("models/en-fr/r9-step-00000001/a/model-1.safetensors", b"torn")
    before = [info.key for info in store.list("models")]
    status, swept = run("store", "sweep", "--dry-run")
    assert (status, swept["dry_run"], swept["removed"]) == (0, True, [])  # it is too young
    assert [info.key for info in store.list("models")] == before


def test_a_store_that_is_not_there_is_not_made_by_looking(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["models", "list", "--store", str(tmp_path / "none")])
    assert end.value.code == 1
    assert f"error: there is no store at {tmp_path}/none" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_text_for_people_is_a_table(store: ObjectStore, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["models", "list", "--store", store.location])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split() == ["NAME", "VERSIONS", "LATEST", "BEST", "ALIASES"]
    assert row.split() == ["en-fr", "2", SECOND, FIRST]
