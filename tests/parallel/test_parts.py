"""From prepared data and a claimed run to a finished one, with the parts that a worker assembles."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from training import examples_of, logged_steps, make_config

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import SaveResult
from eagleray.tasks import load_task
from eagleray.tasks.base import Answer, Example
from eagleray.tasks.text_classification import TextClassificationTask
from eagleray_jobs.data.prepare import prepare
from eagleray_jobs.train.loop import run_loop
from eagleray_jobs.train.parts import assemble
from eagleray_jobs.train.spec import LoopResult, MetricRecord, WorkerSpec

Groups = Callable[[int], RankGroup]


@dataclass
class QuietControl:
    """A launcher that asks for a stop at a step, or never."""

    stop_at: int | None = None
    num_asked: int = 0
    records: list[MetricRecord] = field(default_factory=list)

    def stop_requested(self) -> bool:
        self.num_asked += 1
        return self.num_asked == self.stop_at

    def log(self, record: MetricRecord) -> None:
        self.records.append(record)

    def saved(self, result: SaveResult) -> None: ...


class ErrorRate(TextClassificationTask):
    """A score that is better when smaller, though its name does not say so."""

    best_metric = ("error_rate", False)

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        return {"error_rate": 1.0 - super().score(answers, examples)["accuracy"]}


def work(spec: WorkerSpec, stop_at: int | None) -> tuple[LoopResult, list[MetricRecord]]:
    control = QuietControl(stop_at)
    parts = assemble(spec, torch.device("cpu"))
    return run_loop(spec, parts, control), control.records


@pytest.fixture
def spec(tmp_path: Path) -> Callable[..., WorkerSpec]:
    """`spec(world_size, name=..., task=..., **train)` is a run over rows of a file."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in examples_of("text-classification", 200)))
    store = ObjectStore.open(str(tmp_path / "store"))

    def make(
        world_size: int, name: str = "tiny", attempt: str = "a", task: str = "text-classification", **train: Any
    ) -> WorkerSpec:
        config = make_config("text-classification", layout=world_size, **train)
        data = {"train": str(rows), "validation_split": 0.1, "test_split": 0.0}
        config = RunConfig.model_validate(config.model_dump() | {"name": name, "task": task, "data": data})
        prepared = prepare(config, load_task(config), store)
        store.put(epoch_key(name, 1, 1), b"{}")
        max_steps = config.train.max_steps if config.train else None
        assert max_steps is not None
        handle = RunHandle(store, name, 1, 1, attempt)
        return WorkerSpec(config, handle, prepared.fingerprint, Layout(replicate=world_size), max_steps)

    return make


def test_a_run_goes_on_by_itself_from_its_newest_version(
    group: Groups, spec: Callable[..., WorkerSpec], tmp_path: Path
) -> None:
    keys = {"max_steps": 6, "save_steps": 2, "eval_steps": 3, "save_total_limit": 1}
    stopped = group(2).run(work, spec(2, **keys), 3)[0][0]
    assert (stopped.outcome, stopped.step, stopped.ref) == ("stopped", 3, "tiny@r1-step-00000003")
    ended, records = group(1).run(work, spec(1, attempt="b", **keys), None)[0]
    assert (ended.outcome, ended.step) == ("finished", 6)
    assert [record.step for record in records] == [4, 5, 6]
    assert logged_steps(str(tmp_path / "store")) == [1, 2, 3, 4, 5, 6]
    registry = Registry(spec(1).run.store)
    assert {"accuracy", "loss"} <= registry.open("tiny@latest").manifest.metrics.keys()
    kept = [info.step for info in registry.versions("tiny")]
    assert kept[-1] == 6 and set(kept) <= {3, 6}  # the newest, and the best where that is another one


def test_a_finished_run_ends_at_once_with_its_last_version(group: Groups, spec: Callable[..., WorkerSpec]) -> None:
    first = group(2).run(work, spec(2, max_steps=2), None)[0][0]
    again, records = group(2).run(work, spec(2, attempt="b", max_steps=2), None)[0]
    assert (again.outcome, again.step, again.ref, records) == ("finished", 2, first.ref, [])
    assert again.scores == first.scores and again.scores


def test_init_from_starts_with_the_weights_of_another_run(group: Groups, spec: Callable[..., WorkerSpec]) -> None:
    group(2).run(work, spec(2, max_steps=3), None)
    group(2).run(work, spec(2, name="next", max_steps=1, learning_rate=0.0, init_from="tiny@latest"), None)
    registry = Registry(spec(1).run.store)
    theirs, ours = registry.open("tiny@latest").tensors(), registry.open("next@latest").tensors()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize("named", [None, "error_rate"])
def test_the_direction_of_the_tasks_own_score_is_the_tasks_also_where_the_file_names_it(
    group: Groups, spec: Callable[..., WorkerSpec], named: str | None
) -> None:
    keys = {"max_steps": 1, "eval_steps": 1, "metric_for_best_model": named}
    result = group(1).run(work, spec(1, task="test_parts:ErrorRate", **keys), None)[0][0]
    manifest = Registry(spec(1).run.store).open("tiny").manifest
    assert manifest.best_metric == ("error_rate", False)
    assert manifest.metrics["error_rate"] == result.best_score


def test_tensorboard_files_stand_in_the_runs_folder(
    group: Groups, spec: Callable[..., WorkerSpec], tmp_path: Path
) -> None:
    group(1).run(work, spec(1, max_steps=2, report_to=["tensorboard"]), None)
    assert list((tmp_path / "store/runs/tiny/r1/tensorboard").glob("events.out.tfevents.*"))
