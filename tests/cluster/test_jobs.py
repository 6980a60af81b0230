"""Verbs as jobs of a real cluster: they train, stop with a commit, go on, and are told of when it is over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest
from ray_cluster import RayCluster
from serving_models import family, wait_gone

from eagleray.store.objects import ObjectStore

OWN_MODEL = Path(__file__).parents[2] / "docs" / "own-model" / "length-guess.yaml"
OVERRIDES = [
    "model.config.d_model=8",
    "parallel.data_parallel_replicate_degree=1",
    "train.max_steps=1000000",
    "train.lr_scheduler_type=constant",
    "train.warmup_steps=0",
    "train.logging_steps=1",
    "train.eval_steps=null",
    "train.save_steps=null",
]
TIMEOUT_S = 240.0
pytestmark = pytest.mark.timeout(600)  # the story that most of them tell is two jobs long


def eagleray(*arguments: str | Path, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eagleray.cli", *map(str, arguments)]
    environment = {**os.environ, **environ}
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment)


def as_json(*arguments: str | Path, **environ: str) -> dict[str, Any]:
    done = eagleray(*arguments, "--json", **environ)
    assert done.stdout, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@dataclass(frozen=True)
class Story:
    """A job that was stopped, and the one that went on."""

    store: Path
    running: dict[str, Any]
    stopped: dict[str, Any]
    again: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def story(ray_cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory) -> Story:
    """Train a user's own model as a job, stop it, and submit it again up to five steps later."""
    store = tmp_path_factory.mktemp("jobs") / "store"
    place = ["--store", store, "--address", ray_cluster.dashboard]
    submit = ["jobs", "submit", "train", OWN_MODEL, *OVERRIDES]
    submitted = as_json(*submit, *place)
    assert "id" in submitted, submitted
    job = submitted["id"]
    await_step(store, 3, job)
    running = as_json("jobs", "status", job, "--store", store)
    stopped = as_json("jobs", "stop", job, "--store", store)
    last = stopped["result"]["step"] + 5
    again = eagleray(*submit, f"train.stop_at_step={last}", "--follow", *place)
    return Story(store, running, stopped, again)


def await_step(store: Path, step: int, job: str) -> None:
    metrics = store / "runs" / "length-guess" / "r1" / "metrics.jsonl"
    deadline = time.monotonic() + TIMEOUT_S
    while not metrics.exists() or len(metrics.read_text().splitlines()) < step:
        has_ended = (store / "jobs" / job / "end.json").exists()
        assert not has_ended and time.monotonic() < deadline, as_json("jobs", "logs", job, "--store", store)["log"]
        time.sleep(0.2)


def test_a_job_that_is_stopped_commits_first(story: Story) -> None:
    """The shell that Ray starts finds no Python with Ray on its PATH: the cluster's own has to be used."""
    assert story.running["state"] == "running"
    assert (story.stopped["state"], story.stopped["exit_status"]) == ("stopped", 143), story.stopped
    assert story.stopped["result"]["ref"] == f"length-guess@r1-step-{story.stopped['result']['step']:08d}"


def test_a_job_that_is_submitted_again_goes_on(story: Story) -> None:
    assert story.again.returncode == 0, story.again.stdout + story.again.stderr
    latest = as_json("models", "show", "length-guess@latest", "--store", story.store)
    assert (latest["run"], latest["step"]) == (1, story.stopped["result"]["step"] + 5)


def test_the_store_tells_what_happened_without_the_cluster(story: Story) -> None:
    place = ["--store", story.store, "--address", "http://127.0.0.1:1"]
    listed = as_json("jobs", "list", *place)["jobs"]
    assert [(job["verb"], job["state"]) for job in listed] == [("train", "stopped"), ("train", "succeeded")]
    log = as_json("jobs", "logs", listed[1]["id"], *place)["log"]
    assert f"Running entrypoint for job {listed[1]['id']}" in log


def test_the_clusters_ray_runs_the_packages_that_were_shipped(story: Story) -> None:
    key = f"jobs/{story.stopped['id']}/started.json"
    started = json.loads(ObjectStore.open(str(story.store)).get(key))
    ray = find_spec("ray")
    assert ray is not None and started["ray"] == ray.origin
    assert "py_modules_files" in started["package"]


def test_what_the_job_committed_answers_from_a_detached_server_which_is_stopped_without_a_trace(
    story: Story, tmp_path: Path
) -> None:
    home = {"EAGLERAY_HOME": str(tmp_path / "home")}
    words = [OWN_MODEL, "serve.ref=@latest", "serve.num_replicas=1", "serve.ray_actor_options.num_cpus=0.25"]
    served = as_json("serve", *words, "--store", story.store, "--port", "0", "--detach", **home)
    assert "url" in served, served
    try:
        everything = family(served["pid"])
        answer = httpx.post(served["url"] + "/v1/predict", json={"inputs": [{"source": "January 5"}]}, timeout=60)
        assert answer.status_code == 200, answer.text
        version = f"r1-step-{story.stopped['result']['step'] + 5:08d}"
        assert answer.json()["version"] == version
        assert isinstance(answer.json()["predictions"][0]["characters"], int)
        (record,) = as_json("serve", "status", **home)["servers"]
        shown = (record["id"], record["state"], record["models"])
        assert shown == (served["id"], "ready", [f"length-guess@{version}"])
    finally:
        stopped = as_json("serve", "stop", **home)
    assert stopped == {"stopped": [served["id"]]}
    assert wait_gone(everything) == []
    assert not Path(record["folder"]).exists()
    assert as_json("serve", "status", **home) == {"servers": []}
    with pytest.raises(httpx.ConnectError):
        httpx.get(served["url"])


def test_evaluate_and_predict_run_as_jobs(story: Story, ray_cluster: RayCluster, tmp_path: Path) -> None:
    place = ["--store", story.store, "--address", ray_cluster.dashboard, "--follow"]
    words = [OWN_MODEL, *OVERRIDES, "--ref", "length-guess@latest", "--num-workers", "1"]
    evaluated = as_json("jobs", "submit", "evaluate", *words, *place)
    assert evaluated["state"] == "succeeded", evaluated
    assert evaluated["result"]["ref"].startswith("length-guess@r1-step-")

    rows, answers = tmp_path / "rows.jsonl", tmp_path / "answers.jsonl"
    rows.write_text("".join(json.dumps({"source": f"January {day}"}) + "\n" for day in range(1, 6)))
    # Where the code lay in training is a job's own folder, which is gone.
    words = [
        "length-guess@latest",
        rows,
        answers,
        "--code",
        OWN_MODEL.parent / "length_guess",
        "--num-workers",
        "1",
    ]
    predicted = as_json("jobs", "submit", "predict", *words, *place)
    assert predicted["state"] == "succeeded", predicted
    assert [json.loads(line)["source"] for line in answers.read_text().splitlines()] == [
        f"January {day}" for day in range(1, 6)
    ]


def test_a_job_that_fails_says_why(ray_cluster: RayCluster, tmp_path: Path) -> None:
    place = ["--store", tmp_path / "store", "--address", ray_cluster.dashboard]
    too_much = "resources.resources_per_worker={CPU: 100}"
    done = eagleray("jobs", "submit", "train", OWN_MODEL, too_much, "--follow", "--json", *place)
    found = json.loads(done.stdout.splitlines()[-1])
    assert (done.returncode, found["state"], found["exit_status"]) == (2, "failed", 2)
    assert "2 workers x CPU 100 = CPU 200, but the cluster at" in found["message"]


def test_a_cluster_that_is_not_there_is_an_error_of_the_call(tmp_path: Path) -> None:
    place = ["--store", tmp_path / "store", "--address", "http://127.0.0.1:1"]
    done = eagleray("jobs", "submit", "train", OWN_MODEL, *place)
    assert done.returncode == 2
    assert "error: no Jobs API answers at http://127.0.0.1:1" in done.stderr
    assert not list(tmp_path.rglob("submitted.json"))
