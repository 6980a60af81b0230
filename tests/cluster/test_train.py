"""`eagleray train` on Ray, with two workers: a whole run, and every way of not reaching its end."""

from __future__ import annotations

import random
import secrets
import shutil
import signal
import time
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from train_runs import (
    LAST,
    MAX_STEPS,
    CommandLine,
    FinishedRun,
    assert_bitwise_equal,
    await_commit,
    finish,
    metrics,
    weights,
    write_run,
)


def test_a_run_commits_measures_and_reports(undisturbed: FinishedRun) -> None:
    report = undisturbed.done.value
    assert (report["outcome"], report["ref"], report["step"]) == ("finished", LAST, MAX_STEPS)
    assert report["num_workers"] == 2 and report["store"] == str(undisturbed.store)
    assert "accuracy" in report["scores"] and report["restarts"] == 0
    phases = ["claim", "start Ray", "prepare data", "start workers", "load model", "first step", "train"]
    assert list(report["phases_s"]) == phases
    records = metrics(undisturbed.store)
    assert [record["step"] for record in records] == list(range(1, MAX_STEPS + 1))
    expected = {"step", "epoch", "loss", "learning_rate", "grad_norm", "examples_per_s", "tokens_per_s"}
    assert expected | {"memory_bytes"} <= records[0].keys()


def test_progress_is_shown_without_a_line_of_rays_own(undisturbed: FinishedRun) -> None:
    lines = undisturbed.done.stderr.splitlines()
    assert any(line.startswith("start workers (prepare data took") for line in lines)
    assert f"committed {LAST}" in lines
    assert not [
        line for line in lines if "ray" in line.lower() and not line.startswith(("start Ray", "prepare data"))
    ]


def test_a_finished_run_says_so_and_starts_nothing(undisturbed: FinishedRun, command_line: CommandLine) -> None:
    done = command_line.run("train", undisturbed.file, "--store", undisturbed.store)
    assert (done.status, done.value["outcome"], done.value["ref"]) == (0, "already_finished", LAST)
    assert "start Ray" not in done.stderr


def test_another_file_under_the_same_name_is_refused_with_the_key(
    undisturbed: FinishedRun, command_line: CommandLine
) -> None:
    done = command_line.run("train", undisturbed.file, "train.learning_rate=0.5", "--store", undisturbed.store)
    assert done.status == 2
    assert "train.learning_rate" in done.value["error"]["message"]


@pytest.mark.timeout(600)  # four starts of two workers
def test_killed_and_interrupted_and_killed_again_a_run_in_a_bucket_ends_bitwise_as_the_undisturbed_one(
    ray_cluster: RayCluster, command_line: CommandLine, undisturbed: FinishedRun, s3_bucket: str, tmp_path: Path
) -> None:
    """A worker, then Ctrl-C, then the driver; and where the store and the data lie does not show either."""
    bucket = f"{s3_bucket}/{secrets.token_hex(4)}"
    file, store = write_run(tmp_path, bucket=bucket), f"{bucket}/store"
    call = ("train", file, "--address", ray_cluster.address, "--store", store)
    with command_line.start(*call) as process:
        await_commit(store, random.choice((4, 8)), process)
        random.choice(ray_cluster.find_processes("ray::RayTrainWorker")).send_signal(signal.SIGKILL)
        second = command_line.run(*call)  # meanwhile the workers start again
        assert (second.status, second.value["error"]["code"]) == (1, "owner_alive"), second.stderr
        assert f"run r1 of words belongs to process {process.pid} of" in second.value["error"]["message"]
        await_commit(store, 12, process)
        process.send_signal(signal.SIGINT)
        done = finish(process)
    assert (done.status, done.value["outcome"]) == (128 + signal.SIGINT, "stopped"), done.stderr
    assert done.value["restarts"] == 1
    assert done.value["next_commands"] == [f"eagleray train {file} --store {store}"]
    stopped_at = done.value["step"]
    assert done.value["ref"] == f"words@r1-step-{stopped_at:08d}"
    with command_line.start(*call) as process:
        await_commit(store, (stopped_at // 4 + 1) * 4, process)
        process.kill()  # the driver, and with it the whole run
    done = command_line.run(*call)
    assert (done.status, done.value.get("outcome")) == (0, "finished"), done.stderr
    assert_bitwise_equal(weights(store, LAST), undisturbed.weights)
    assert [record["step"] for record in metrics(store)] == list(range(1, MAX_STEPS + 1))


def test_a_longer_run_goes_on_with_fewer_workers_up_to_a_step(
    ray_cluster: RayCluster, command_line: CommandLine, undisturbed: FinishedRun, tmp_path: Path
) -> None:
    store, stop_at = tmp_path / "store", MAX_STEPS + 3
    shutil.copytree(undisturbed.store, store)
    changes = ("train.max_steps=400", f"train.stop_at_step={stop_at}", "parallel.data_parallel_replicate_degree=1")
    done = command_line.run(
        "train", undisturbed.file, *changes, "--address", ray_cluster.address, "--store", store
    )
    assert (done.status, done.value["outcome"]) == (0, "stopped_at_step"), done.stderr
    assert (done.value["ref"], done.value["num_workers"]) == (f"words@r1-step-{stop_at:08d}", 1)
    assert "the learning-rate schedule is stretched to the new length" in done.stderr
    assert [record["step"] for record in metrics(store)] == list(range(1, stop_at + 1))


@pytest.mark.slow
def test_another_models_weights_are_what_a_run_begins_with(
    undisturbed: FinishedRun, ray_cluster: RayCluster, command_line: CommandLine
) -> None:
    changes = ("name=next", f"train.init_from={LAST}", "train.learning_rate=0.0", "train.max_steps=1")
    done = command_line.run(
        "train", undisturbed.file, *changes, "--address", ray_cluster.address, "--store", undisturbed.store
    )
    assert done.status == 0, done.stderr
    begun = weights(undisturbed.store, done.value["ref"], "model.")
    assert_bitwise_equal(begun, {name: undisturbed.weights[name] for name in begun})


def test_a_rank_that_raises_ends_the_run_with_its_own_traceback_once(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path: Path
) -> None:
    file = write_run(tmp_path, "slow_words:BrokenWords")
    done = command_line.run("train", file, "--address", ray_cluster.address, "--store", tmp_path / "store")
    assert (done.status, done.value["error"]["code"]) == (1, "worker")
    assert "rank 1 raised KeyError: 'no such word'" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert 'raise KeyError("no such word")' in done.stderr
    assert "[restart" not in done.stderr
    logs = Path(done.value["error"]["hint"].rsplit(" ", 1)[-1])
    assert any(logs.glob("worker-*"))


@pytest.mark.slow
@pytest.mark.parametrize("degree", ["data_parallel_shard_degree", "tensor_parallel_degree"])
def test_a_rank_that_hangs_ends_the_run_within_a_minute_with_where_all_ranks_were(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path: Path, degree: str
) -> None:
    file, store = write_run(tmp_path, "slow_words:StuckWords"), tmp_path / "store"
    changes = ("parallel.data_parallel_replicate_degree=1", f"parallel.{degree}=2")
    limits = ("train.ddp_timeout=8", "train.max_failures=0")
    done = command_line.run("train", file, *changes, *limits, "--address", ray_cluster.address, "--store", store)
    second_step = (store / "runs/words/r1/metrics.jsonl").stat().st_mtime
    assert time.time() - second_step < 60
    assert (done.status, done.value["error"]["code"]) == (1, "worker")
    first, waiting, hanging = done.value["error"]["message"].split("\n")
    assert first == "rank 1 did not come to a collective in which rank 0 waited"
    assert waiting.startswith("  rank 0: step 3, ") and "(waiting)" in waiting
    assert hanging.startswith("  rank 1: step 3, ") and hanging.endswith("in loss") and "slow_words" in hanging
    assert "train.ddp_timeout" in done.value["error"]["hint"]
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_module_that_the_layout_cannot_cut_is_refused_before_there_are_workers(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path: Path
) -> None:
    file = write_run(tmp_path, "text-classification")
    degrees = ("parallel.data_parallel_replicate_degree=1", "parallel.tensor_parallel_degree=2")
    model = "model={factory: 'slow_words.reader:build', tokenizer: {vocab_size: 300}}"
    call = ("train", file, model, "--address", ray_cluster.address, "--store", tmp_path / "store")
    done = command_line.run(*call, *degrees)
    assert (done.status, done.value["error"]["code"]) == (2, "config")
    assert "parallel.tensor_parallel_degree 2 does not divide heads 3" in done.value["error"]["message"]
    assert "start workers" not in done.stderr


def test_more_than_a_joined_cluster_has_is_refused_with_the_numbers(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path: Path
) -> None:
    file = write_run(tmp_path)
    asked = "resources.resources_per_worker={CPU: 100}"
    done = command_line.run("train", file, asked, "--address", ray_cluster.address, "--store", tmp_path / "store")
    assert (done.status, done.value["error"]["code"]) == (2, "resource")
    assert "2 workers x CPU 100 = CPU 200, but the cluster at" in done.value["error"]["message"]
    assert done.value["error"]["message"].endswith("has CPU 8")
