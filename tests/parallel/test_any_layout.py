"""Written by any layout, continued by any other, as if nothing had happened; read, served and exported at once."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from training import (
    Job,
    Outcome,
    checkpoint_tensors,
    checkpoint_weights_in_layout,
    degrees_of,
    make_config,
    train,
)

from eagleray.config.layout import Layout, parse_layout
from eagleray.engine import load_engine
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray_jobs.export import export_model

LAYOUTS = [
    "ddp2",
    "fsdp4",
    "hsdp2x2",
    "tp2",
    "pp2",
    "pp2.tp2",
    "fsdp2.tp2",
    "pp2.fsdp2.tp2",
    "fsdp3",
]
PAIRS = [(writer, reader) for writer in LAYOUTS for reader in LAYOUTS]
SAMPLE = {("ddp2", "pp2"), ("pp2", "tp2"), ("tp2", "fsdp3"), ("fsdp3", "ddp2")}
STEPS, CUT = 6, 3
# 24 rows are equal slices for 2, 3 and 4 data ranks, and four micro-batches of a pipeline of each.
KEYS: dict[str, Any] = {
    "max_steps": STEPS,
    "save_steps": CUT,
    "global_batch_size": 24,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 2.0,
}
BARS = {"adamw": 1e-5, "sgd": 1e-6}


class Runs:
    """Runs of one file in every layout; each is made once."""

    def __init__(self, group: Callable[[int], RankGroup], folder: Path) -> None:
        self._group, self._folder = group, folder
        self.written = cache(self._write)

    def _write(self, layout: str, optim: str) -> tuple[Outcome, Path]:
        """Train without an interruption, saving at the cut and at the end."""
        folder = self._folder / f"{layout}-{optim}"
        return self.run(Job(config_of(layout, optim), str(folder))), folder

    def continued(self, folder: Path, layout: str, optim: str) -> Outcome:
        """Go on from the cut of a copy of a run, whose end is left out."""
        copy = self._folder / "continued"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns(f"r1-step-{STEPS:08d}"))
        return self.run(Job(config_of(layout, optim), str(copy), resume_step=CUT))

    def run(self, job: Job) -> Outcome:
        outcome: Outcome = self._group(workers(job)).run(train, job, timeout_s=240.0)[0]
        return outcome

    def read_back(self, folder: Path, layout: str) -> dict[str, torch.Tensor]:
        """Load the weights of the cut into the layout, and put them together again."""
        job = Job(config_of(layout, "adamw"), str(folder), resume_step=CUT)
        parts = self._group(workers(job)).run(checkpoint_weights_in_layout, job, timeout_s=240.0)
        return {name: tensor for part in parts for name, tensor in part.items()}


def workers(job: Job) -> int:
    parallel = job.config.parallel.model_dump()
    degrees = [parallel[key] for key in degrees_of(Layout())]
    return int(torch.tensor(degrees).prod())


def config_of(layout: str, optim: str) -> Any:
    momentum = 0.9 if optim == "sgd" else 0.0
    return make_config(layout=degrees_of(parse_layout(layout)), optim=optim, momentum=momentum, **KEYS)


@pytest.fixture(scope="module")
def runs(group: Callable[[int], RankGroup], tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(group, tmp_path_factory.mktemp("layouts"))


def sampled(cases: list[Any], sample: set[Any]) -> list[Any]:
    """Mark what is not in the sample as slow."""
    marked = [
        pytest.param(*case, id="-".join(case), marks=() if case in sample else pytest.mark.slow) for case in cases
    ]
    assert {case for case in cases if case in sample} == sample
    return marked


def test_the_pairs_are_all_that_are_promised() -> None:
    assert len(PAIRS) == 81
    assert {str(parse_layout(text)) for text in LAYOUTS} == set(LAYOUTS)


@pytest.mark.parametrize("writer, reader", sampled(PAIRS, SAMPLE))
def test_what_one_layout_wrote_another_continues_as_if_never_interrupted(
    runs: Runs, writer: str, reader: str
) -> None:
    whole, folder = runs.written("single", "adamw")[0], runs.written(writer, "adamw")[1]
    continued = runs.continued(folder, reader, "adamw")
    expected = {step: whole.losses[step] for step in range(CUT + 1, STEPS + 1)}
    assert continued.losses == pytest.approx(expected, rel=BARS["adamw"])
    assert [record.learning_rate for record in continued.records] == [
        record.learning_rate for record in whole.records[CUT:]
    ]
    torch.testing.assert_close(continued.tensors, whole.tensors, rtol=0, atol=1e-5)


@pytest.mark.parametrize("writer, reader", sampled(PAIRS, {("tp2", "pp2")}))
def test_with_momentum_losses_agree_to_a_millionth(runs: Runs, writer: str, reader: str) -> None:
    whole, folder = runs.written("single", "sgd")[0], runs.written(writer, "sgd")[1]
    continued = runs.continued(folder, reader, "sgd")
    expected = {step: whole.losses[step] for step in range(CUT + 1, STEPS + 1)}
    assert continued.losses == pytest.approx(expected, rel=BARS["sgd"])


@pytest.mark.parametrize("writer, reader", sampled(PAIRS, {("ddp2", "tp2"), ("pp2", "pp2"), ("tp2", "fsdp3")}))
def test_weights_are_bit_equal_whoever_wrote_and_whoever_read_them(runs: Runs, writer: str, reader: str) -> None:
    folder = runs.written(writer, "adamw")[1]
    stored = checkpoint_tensors(str(folder), CUT)
    read = runs.read_back(folder, reader)
    assert {f"model.{name}" for name in read} == {name for name in stored if name.startswith("model.")}
    assert [name for name, tensor in read.items() if not torch.equal(tensor, stored[f"model.{name}"])] == []


@pytest.mark.parametrize(
    "writer", [pytest.param(each, marks=() if each in ("tp2", "pp2") else pytest.mark.slow) for each in LAYOUTS]
)
def test_a_version_is_served_and_exported_at_once(runs: Runs, tmp_path: Path, writer: str) -> None:
    from transformers import AutoModelForSeq2SeqLM

    outcome, folder = runs.written(writer, "adamw")
    registry = Registry(ObjectStore.open(str(folder)))
    version = registry.open("tiny@latest")
    assert (version.manifest.step, version.manifest.layout) == (STEPS, writer)
    (answer,) = load_engine(version).answer([{"source": "two three"}], {"max_new_tokens": 4})
    assert set(answer) == {"text"}  # type: ignore[arg-type]
    export_model(registry, "tiny@latest", tmp_path / "export")
    exported = dict(AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").named_parameters())
    assert [name for name in exported if not torch.equal(exported[name], outcome.tensors[name])] == []
