"""From prepared data and a claimed run to a finished one, with the parts that a worker assembles."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup, RanksFailed
from training import examples_of, logged_steps, make_config

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.engine import load_engine
from eagleray.errors import ConfigError
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import SaveResult
from eagleray.tasks import load_task
from eagleray.tasks.base import Answer, Example
from eagleray.tasks.text_classification import TextClassificationTask
from eagleray_jobs.data.prepare import prepare
from eagleray_jobs.export import export_model
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
        world_size: int,
        name: str = "tiny",
        attempt: str = "a",
        task: str = "text-classification",
        model: dict[str, Any] | None = None,
        **train: Any,
    ) -> WorkerSpec:
        config = make_config("text-classification", layout=world_size, **train)
        data = {"train": str(rows), "validation_split": 0.1, "test_split": 0.0}
        changes = {"name": name, "task": task, "data": data, **({"model": model} if model else {})}
        config = RunConfig.model_validate(config.model_dump() | changes)
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


LORA = {"rank": 2, "alpha": 6.0, "target_modules": ["query"], "modules_to_save": ["classifier"]}


def test_an_adapter_alone_goes_on_and_answers_with_its_base_and_with_no_other(
    group: Groups, spec: Callable[..., WorkerSpec], tmp_path: Path
) -> None:
    group(1).run(work, spec(1, max_steps=2), None)
    registry = Registry(spec(1).run.store)
    export_model(registry, "tiny@latest", tmp_path / "base")
    model = {"pretrained": str(tmp_path / "base"), "adapter": {**LORA, "commit": "adapter"}}
    keys = {"max_steps": 4, "learning_rate": 0.05, "model": model}
    _, expected = group(1).run(work, spec(1, name="once", **keys), None)[0]
    group(2).run(work, spec(2, name="twice", **keys), 2)
    _, records = group(1).run(work, spec(1, name="twice", attempt="b", **keys), None)[0]
    assert [record.step for record in records] == [3, 4]
    assert [record.loss for record in records] == pytest.approx([r.loss for r in expected[2:]], abs=1e-6)

    twice = registry.open("twice@latest")
    names = {entry.name for entry in twice.manifest.tensors if entry.name.startswith("model.")}
    assert all(".lora_" in name or name.startswith("model.classifier.") for name in names) and len(names) == 6
    weights = dict(load_engine(twice).model.named_parameters())
    base, own = registry.open("tiny@latest").tensors(), twice.tensors()
    for name, weight in weights.items():
        prefix = name.removesuffix(".weight")
        added = 0.0
        if f"{prefix}.lora_A.weight" in own:
            added = 3.0 * (own[f"{prefix}.lora_B.weight"] @ own[f"{prefix}.lora_A.weight"])
        assert torch.equal(weight, own.get(name, base[name] + added)), name

    export_model(registry, "once@latest", tmp_path / "whole")
    (tmp_path / "base" / "model.safetensors").write_bytes((tmp_path / "whole" / "model.safetensors").read_bytes())
    with pytest.raises(RanksFailed, match=r"the run.s adapter stands on .* with SHA-256"):
        group(1).run(work, spec(1, name="twice", attempt="c", **keys), None)
    with pytest.raises(ConfigError, match="holds an adapter of weights with SHA-256"):
        load_engine(twice)


@pytest.mark.slow
def test_a_merged_adapter_of_another_run_goes_on_from_the_version_that_it_stood_on(
    group: Groups, spec: Callable[..., WorkerSpec]
) -> None:
    keys = {"max_steps": 4, "save_steps": 2}
    group(1).run(work, spec(1, **keys), 2)
    model = {**spec(1).config.model.model_dump(), "adapter": LORA}
    own = {"name": "next", "learning_rate": 0.05, "init_from": "tiny@latest", "model": model}
    group(2).run(work, spec(2, **keys, **own), 2)
    group(1).run(work, spec(1, attempt="b", **keys), None)  # `tiny@latest` is another version now
    group(1).run(work, spec(1, attempt="b", **keys, **own), None)
    registry = Registry(spec(1).run.store)
    version = registry.open("next@latest")
    base, weights, factors = (
        registry.open("tiny@step-2").tensors(), version.tensors(), version.tensors("adapter.")
    )  # fmt: skip
    name = "bert.encoder.layer.0.attention.self.query"
    added = 3.0 * (factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"])
    assert added.abs().max() > 0
    assert torch.equal(weights[f"{name}.weight"], base[f"{name}.weight"] + added)


def test_tensorboard_files_stand_in_the_runs_folder(
    group: Groups, spec: Callable[..., WorkerSpec], tmp_path: Path
) -> None:
    group(1).run(work, spec(1, max_steps=2, report_to=["tensorboard"]), None)
    assert list((tmp_path / "store/runs/tiny/r1/tensorboard").glob("events.out.tfevents.*"))
