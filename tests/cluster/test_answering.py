"""The verbs `evaluate` and `predict` on a real cluster, with a tiny committed model."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from ray_cluster import RayCluster
from serving_models import CODE, commit, echo
from train_runs import CommandLine, await_condition, finish

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_model, model_files
from eagleray.store.claim import RunClaim, claim_run
from eagleray.store.decide import Outcome
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.store.saver import CheckpointSaver
from eagleray.tasks import load_task
from eagleray_jobs.evaluate import evaluate
from eagleray_jobs.pool import CheckpointLoader, run_in_line
from eagleray_jobs.predict import predict

SECTIONS: dict[str, Any] = {
    "name": "tiny",
    "task": "translation",
    "model": {
        "family": "marian",
        "config": {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
        },
        "tokenizer": {"vocab_size": 280},
    },
    "data": {"source": "cldr-en-fr", "max_source_length": 128, "max_target_length": 4},
    "train": {"max_steps": 1},
    "serve": {"max_new_tokens": 4},
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ObjectStore:
    """A store that holds one committed version of a tiny model."""
    store = ObjectStore.open(str(tmp_path_factory.mktemp("answering") / "store"))
    config = RunConfig.model_validate(SECTIONS)
    processor = load_task(config).build_processor(iter([{"source": "one hour", "target": "une heure"}]))
    model = build_model(config, processor, "cpu")
    claim = claim_run(store, config, notify=lambda _: None)
    assert isinstance(claim, RunClaim)
    with claim:
        saver = CheckpointSaver(None, claim.handle, layout=Layout(), config=config)
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors = {f"model.{name}": named[name].detach() for name in model.state_dict() if name in named}
        saver.save(
            step=1, tensors=tensors, files=model_files(model, config, processor), state={"step": 1}, metrics={}
        )
        saver.wait()
        saver.close()
        claim.finish(Outcome.FINISHED, {})
    return store


def opened(store: ObjectStore) -> tuple[str, CheckpointLoader]:
    """The tiny model for one worker: this process."""
    name, _, version = (ref := Registry(store).resolve("tiny")).partition("@")
    return ref, CheckpointLoader(store, name, version, serve=RunConfig.model_validate(SECTIONS).serve)


def eagleray(cluster: RayCluster, environment: dict[str, str], *arguments: object) -> dict[str, Any]:
    command = [sys.executable, "-m", "eagleray.cli", *map(str, arguments), "--address", cluster.address, "--json"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    own = ("predict: ", "report: ", "data: ")
    assert [line for line in done.stderr.splitlines() if not line.startswith(own)] == []
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def test_four_workers_that_go_on_where_two_were_stopped_write_byte_for_byte_what_one_writes(
    ray_cluster: RayCluster, ray_environment: dict[str, str], store: ObjectStore, tmp_path: Path
) -> None:
    lines = [f"sentence number {i} of {'very ' * (i % 7)}many" for i in range(10_000)]
    (tmp_path / "in.txt").write_text("\n".join(lines) + "\n")

    ref, load = opened(store)
    config, words, alone = RunConfig.model_validate(SECTIONS), tmp_path / "in.txt", tmp_path / "out-1.jsonl"
    one = predict(config, ref, load, run_in_line, load_task(config), str(words), str(alone))
    call = ("predict", "tiny", words, tmp_path / "out-4.jsonl", "--store", store.location, "--num-workers")
    with CommandLine(ray_environment).start(*call, 2, "--address", ray_cluster.address) as process:
        await_condition(lambda: any(tmp_path.glob("out-4.jsonl.parts/*/*.json")), process)
        process.send_signal(signal.SIGTERM)
        stopped = finish(process)
    assert (stopped.status, stopped.value["error"]["code"]) == (143, "interrupted"), stopped.stderr
    assert f"kept in {tmp_path}/out-4.jsonl.parts: the same call goes on from there" in stopped.stderr
    assert not (tmp_path / "out-4.jsonl").exists()
    num_kept = len(list(tmp_path.glob("out-4.jsonl.parts/*/*.json")))
    four = eagleray(ray_cluster, ray_environment, *call, 4)
    assert (one.num_rows, one.num_errors) == (four["num_rows"], four["num_errors"]) == (10_000, 0)
    assert four["num_resumed"] == 1000 * num_kept and 0 < num_kept < 10
    written = (tmp_path / "out-1.jsonl").read_bytes()
    assert written == (tmp_path / "out-4.jsonl").read_bytes()
    assert [json.loads(line)["source"] for line in written.split(b"\n") if line] == lines


def test_a_killed_prediction_does_only_those_chunks_twice_that_were_being_answered(
    ray_cluster: RayCluster, ray_environment: dict[str, str], tmp_path: Path
) -> None:
    notes, num_chunks, num_workers = tmp_path / "notes", 12, 2
    model = {"factory": "echo_task:build", "config": {"notes": str(notes), "first_s": 6.0}}
    commit({**echo("noting"), "task": "noting_task:NotingTask", "model": model}, tmp_path / "store")
    values = list(range(num_chunks * 1000))
    (tmp_path / "in.jsonl").write_text("".join(f'{{"value": {value}}}\n' for value in values))
    call = ("predict", "noting", tmp_path / "in.jsonl", tmp_path / "out.jsonl", "--store", tmp_path / "store")
    call += ("--code", CODE, "--num-workers", num_workers)  # type: ignore[assignment]

    def kept() -> list[Path]:
        return list(tmp_path.glob("out.jsonl.parts/*/*.json"))

    with CommandLine(ray_environment).start(*call, "--address", ray_cluster.address, own_group=True) as process:
        await_condition(lambda: len(kept()) >= 5, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait(60)
    assert not (tmp_path / "out.jsonl").exists()
    begun, num_kept = notes.read_text().split(), len(kept())
    assert "0" in begun and not any(path.name.startswith("00000000") for path in kept()), "the first one is slow"
    report = eagleray(ray_cluster, ray_environment, *call)
    assert (report["num_rows"], report["num_errors"]) == (len(values), 0)
    assert report["num_resumed"] == 1000 * num_kept
    written = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["answer"]["value"] for row in written] == [2.0 * value for value in values]
    times = Counter(notes.read_text().split())
    assert len(times) == num_chunks and 1 <= sum(times.values()) - num_chunks <= num_workers


def test_a_version_with_code_of_its_own_answers_where_the_code_lies_elsewhere(
    ray_cluster: RayCluster, ray_environment: dict[str, str], tmp_path: Path
) -> None:
    in_training = tmp_path / "in-training"
    in_training.symlink_to(CODE)
    commit({**echo("echo"), "code": [str(in_training)]}, tmp_path / "store")
    in_training.unlink()
    (tmp_path / "in.jsonl").write_text('{"value": 2.5}\n')
    report = eagleray(
        ray_cluster, ray_environment, "predict", "echo", tmp_path / "in.jsonl", tmp_path / "out.jsonl",
        "--store", tmp_path / "store", "--num-workers", 1, "--code", CODE,
    )  # fmt: skip
    assert (report["num_rows"], report["num_errors"]) == (1, 0)
    assert json.loads((tmp_path / "out.jsonl").read_text())["answer"]["value"] == 2.5


def test_scores_are_the_same_with_three_workers_and_with_one(
    ray_cluster: RayCluster, ray_environment: dict[str, str], store: ObjectStore, tmp_path: Path
) -> None:
    (tmp_path / "tiny.yaml").write_text(json.dumps(SECTIONS))
    call = ("evaluate", tmp_path / "tiny.yaml", "--store", store.location, "--num-workers", 3)
    three = eagleray(ray_cluster, ray_environment, *call)
    ref, load = opened(store)
    one = evaluate(RunConfig.model_validate(SECTIONS), ref, load, run_in_line)
    assert three["scores"] == one.scores
    assert three["baselines"] == one.baselines and "exact_match/date" in three["scores"]
    assert len([info for info in store.list("runs/tiny/r1/evaluations")]) == 1
