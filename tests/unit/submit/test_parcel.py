"""What a job takes along, and what runs in it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from eagleray.config.loader import load_files
from eagleray.errors import UsageError
from eagleray.store.objects import ObjectStore
from eagleray_jobs.submit.api import choose_address
from eagleray_jobs.submit.parcel import entrypoint, environment, pack
from eagleray_jobs.submit.records import JobRecord, JobRecords

FILE = (
    "name: en-fr\ntask: translation\nmodel: {family: marian}\ndata: {source: cldr-en-fr}\ntrain: {max_steps: 9}\n"
)
RECORD = JobRecord("j", "validate", "", (), "http://cluster:8265")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file.yaml"
    path.write_text(FILE)
    return path


def test_the_file_travels_as_it_was_resolved_here_with_its_code(file: Path, tmp_path: Path) -> None:
    package = tmp_path / "src" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WORD = 1\n")
    file.write_text(FILE.replace("source: cldr-en-fr", "train: rows.jsonl") + "code: [src, src/mine]\n")
    parcel = pack("train", [str(file), "train.learning_rate=1e-4"], "/shared/store")
    staging = tmp_path / "staging"
    staging.mkdir()
    env = environment("job-1", parcel, staging)
    (there,) = load_files([Path(env["working_dir"]) / "en-fr.yaml"])
    assert there.config.train is not None and there.config.train.learning_rate == 1e-4
    assert there.config.store == "/shared/store"
    assert there.config.data.train == str(tmp_path / "rows.jsonl")
    assert [Path(entry).name for entry in there.config.code] == ["src", "mine"]
    assert (Path(there.config.code[1]) / "__init__.py").read_text() == "WORD = 1\n"
    shipped = {Path(module).name for module in env["py_modules"]}
    assert {"eagleray", "eagleray_jobs", "eagleray_serving", "mine"} <= shipped
    assert any(name.endswith(".dist-info") for name in shipped)


@pytest.mark.parametrize("spelling", [("--code", "src"), ("--code=src",)])
def test_the_code_that_an_option_names_travels_too(
    spelling: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "src" / "mine"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WORD = 1\n")
    monkeypatch.chdir(tmp_path)
    parcel = pack("predict", ["own", "/data/rows.jsonl", "/data/out.jsonl", *spelling], "/shared/store")
    staging = tmp_path / "staging"
    staging.mkdir()
    env = environment("job-1", parcel, staging)
    option, place = parcel.arguments[-2:]
    assert option == "--code"
    assert (Path(env["working_dir"]) / place / "mine" / "__init__.py").read_text() == "WORD = 1\n"
    assert "mine" in {Path(module).name for module in env["py_modules"]}


def test_code_that_is_not_there_is_refused_before_anything_travels() -> None:
    with pytest.raises(UsageError, match="--code nowhere: there is no such directory"):
        pack("predict", ["own", "/in.jsonl", "/out.jsonl", "--code", "nowhere"], "/shared/store")


def test_no_credential_of_the_environment_travels(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"AWS_SECRET_ACCESS_KEY": "secret-1", "RAY_AUTH_TOKEN": "secret-2", "HF_TOKEN": "secret-3"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    parcel = pack("train", [str(file)], "s3://bucket/prefix")
    env = environment("job-1", parcel, tmp_path)
    said = json.dumps([env, parcel.files, parcel.arguments]) + entrypoint("job-1", parcel)
    assert not [value for value in secrets.values() if value in said]
    assert set(env["env_vars"]) == {
        "EAGLERAY_JOB_ID",
        "RAY_JOB_STOP_WAIT_TIME_S",
        "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR",
    }


def test_the_hook_variable_is_the_one_that_ray_reads() -> None:
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    constants = Path(ray.origin).parent / "_private" / "ray_constants.py"
    assert '= "__RAY_WORKER_PROCESS_SETUP_HOOK_ENV_VAR"' in constants.read_text()


def test_the_command_is_safe_in_a_shell(file: Path) -> None:
    hostile = "--note=$(touch /tmp/x); `id` 'quote' \"q\""
    parcel = pack("train", [str(file), hostile], "/shared/store")
    words = shlex.split(entrypoint("job-1", parcel))
    assert words[-2:] == ["en-fr.yaml", hostile]
    done = subprocess.run(
        ["sh", "-c", entrypoint("job-1", parcel)],
        env={"EAGLERAY_PYTHON": "/bin/echo"},
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert done.stdout.endswith(f"train en-fr.yaml {hostile}\n")


@pytest.mark.parametrize("store", ["./store", "store", "a/b"])
def test_a_relative_store_is_refused(file: Path, store: str) -> None:
    with pytest.raises(UsageError, match=f"a job cannot use the relative store {store}"):
        pack("train", [str(file)], store)


@pytest.mark.parametrize("verb", ["serve", "jobs", "init"])
def test_a_verb_that_does_not_run_to_an_end_is_refused(file: Path, verb: str) -> None:
    with pytest.raises(UsageError, match=f"{verb} does not run to an end"):
        pack(verb, [str(file)], "/shared/store")


def test_a_verb_that_does_not_exist_is_refused_with_the_nearest(file: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no verb 'trian'; did you mean train\?"):
        pack("trian", [str(file)], "/shared/store")


def test_a_verb_without_a_file_gets_the_store_and_absolute_paths(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parcel = pack("predict", ["en-fr@best", "in.jsonl", "s3://b/out.jsonl"], "/shared/store")
    assert parcel.arguments == (
        "en-fr@best",
        f"{tmp_path}/in.jsonl",
        "s3://b/out.jsonl",
        "--store",
        "/shared/store",
    )
    assert parcel.notes == (f"in.jsonl is {tmp_path}/in.jsonl in the job: every node must see it there",)


@pytest.mark.parametrize(
    "option, environ, chosen",
    [
        ("http://a:1/", {"RAY_ADDRESS": "b:2"}, "http://a:1"),
        (None, {"RAY_ADDRESS": "b:2", "RAY_API_SERVER_ADDRESS": "http://c:3"}, "http://c:3"),
        (None, {"RAY_ADDRESS": "b:2"}, "b:2"),
        (None, {"RAY_ADDRESS": "auto"}, "http://127.0.0.1:8265"),
        (None, {}, "http://127.0.0.1:8265"),
    ],
)
def test_the_option_goes_before_the_environment(option: str | None, environ: dict[str, str], chosen: str) -> None:
    assert choose_address(option, environ) == chosen


@pytest.mark.parametrize("address", ["http://me:secret@host:8265", "http://host:8265?token=secret"])
def test_an_address_with_credentials_is_refused_without_repeating_them(address: str) -> None:
    with pytest.raises(UsageError, match="the address of host holds credentials or a query") as caught:
        choose_address(address, {})
    assert "secret" not in str(caught.value)


def run_as_job(store: Path, *verb: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eagleray_jobs.submit.entry", "--store", str(store), "--id", "j", "--", *verb]
    log = store.parent / "job.log"
    with log.open("w") as stream:
        done = subprocess.run(command, stdout=stream, stderr=subprocess.STDOUT, text=True, timeout=60)
    done.stdout = log.read_text()
    return done


def test_what_runs_in_a_job_writes_its_start_and_its_end(file: Path, tmp_path: Path) -> None:
    records = JobRecords(ObjectStore.open(str(tmp_path / "store")))
    records.submit(RECORD)
    done = run_as_job(tmp_path / "store", "validate", str(file))
    record = records.get("j")
    assert done.returncode == 0, done.stdout
    assert record.started is not None and record.end is not None
    assert record.end.outcome == "succeeded" and record.end.result is not None
    assert record.end.result["files"][0]["config"]["name"] == "en-fr"


def test_a_verb_that_fails_in_a_job_leaves_its_message_and_its_log(tmp_path: Path) -> None:
    records = JobRecords(ObjectStore.open(str(tmp_path / "store")))
    records.submit(RECORD)
    done = run_as_job(tmp_path / "store", "validate", "none.yaml")
    end = records.get("j").end
    assert done.returncode == 2
    assert end is not None
    assert (end.outcome, end.exit_status) == ("failed", 2)
    assert end.message == "none.yaml: cannot be read: No such file or directory"
    assert "error: none.yaml: cannot be read" in (records.log("j") or "")
