"""A whole training run on the ranks of a group: real models, real store, rows in memory."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from eagleray.config.layout import Layout, resolve_layout
from eagleray.config.schema import RunConfig
from eagleray.errors import EaglerayError, StoreError
from eagleray.models import build_model, build_unfilled, initialize, model_files, stored_tensors
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, apply_layout, apply_pipeline, build_mesh, data_coordinate
from eagleray.parallel.gradients import whole
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.manifest import version_name
from eagleray.store.objects import ObjectStore
from eagleray.store.runs import RunHandle, run_dir
from eagleray.store.saver import CheckpointSaver, SaveResult
from eagleray.tasks import load_task
from eagleray.tasks.base import Answer, Batch, Example, Features, Loss, Processor, Task
from eagleray_jobs.data.cursor import Cursor
from eagleray_jobs.train.batches import Batches
from eagleray_jobs.train.evaluation import Evaluator
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.failures import RankFailure
from eagleray_jobs.train.loop import run_loop
from eagleray_jobs.train.metrics import JsonlFile, MetricSink
from eagleray_jobs.train.optimizer import build_optimizer
from eagleray_jobs.train.parts import Parts
from eagleray_jobs.train.spec import LoopResult, MetricRecord, WorkerSpec
from eagleray_jobs.train.step import TrainStep

WORDS = "one two three four five six seven eight nine ten eleven twelve thirteen twenty thirty forty".split()
HANG_S = 15.0
DEFAULTS: dict[str, Any] = {
    "max_steps": 5,
    "global_batch_size": 64,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "ddp_timeout": 20.0,
}
MODELS: dict[str, dict[str, Any]] = {
    "translation": {
        "family": "marian",
        "config": {
            "d_model": 16,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 2,
            "decoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "decoder_ffn_dim": 32,
            "max_position_embeddings": 128,
        },
        "tokenizer": {"vocab_size": 300},
    },
    "text-classification": {
        "family": "bert",
        "config": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "max_position_embeddings": 128,
        },
        "tokenizer": {"vocab_size": 300},
    },
}


def examples_of(task: str, count: int) -> list[Example]:
    """Make sentences of 1 to 12 words, deterministically."""
    draw = random.Random(7)
    sentences = [[draw.choice(WORDS) for _ in range(draw.randint(1, 12))] for _ in range(count)]
    if task == "translation":
        return [{"source": " ".join(words), "target": " ".join(reversed(words))} for words in sentences]
    return [{"text": " ".join(words), "label": words[0][0]} for words in sentences]


def make_config(
    task: str = "translation", dropout: float = 0.0, layout: int | dict[str, Any] = 1, **train: Any
) -> RunConfig:
    """Make a file for `layout` workers, or with those keys under `parallel`; `train` holds keys of `train`."""
    model = MODELS[task]
    keys = ["dropout"] if task == "translation" else ["hidden_dropout_prob", "attention_probs_dropout_prob"]
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "task": task,
            "model": {**model, "config": model["config"] | dict.fromkeys(keys, dropout)},
            "data": {"train": "unused.jsonl"},
            "train": DEFAULTS | train,
            "parallel": {"data_parallel_replicate_degree": layout} if isinstance(layout, int) else layout,
        }
    )


class MemoryRows:
    """Rows of a split, in memory."""

    def __init__(self, task: Task, processor: Processor, examples: Sequence[Example]) -> None:
        encoded = [task.encode(example, processor) for example in examples]
        self._rows = [row.features | {"id": number} for number, row in enumerate(encoded)]
        self._examples = examples
        self.lengths = np.array([row.length for row in encoded])

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Features:
        return self._rows[index]

    def example(self, index: int) -> Example:
        return self._examples[index]


class Recording(Task):
    """A task that notes the rows of every training step, and can spoil a loss."""

    def __init__(self, inner: Task, job: Job) -> None:
        super().__init__(inner.config)
        self._inner = inner
        self._job = job
        self.best_metric = inner.best_metric  # type: ignore[misc]
        self.step = 0
        self.seen: dict[int, list[int]] = {}
        self.num_forwards = 0

    def build_processor(self, examples: Any) -> Processor:
        raise NotImplementedError

    def load_processor(self, files: Mapping[str, bytes]) -> Processor:
        raise NotImplementedError

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Any:
        return self._inner.encode(example, processor, answer=answer)

    def collate(self, rows: Sequence[Features], processor: Processor) -> Batch:
        batch = self._inner.collate(rows, processor)
        return batch | {"ids": torch.tensor([row["id"] for row in rows])}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        loss = self._inner.loss(model, batch)
        if model.training:
            self.num_forwards += 1
            self.seen.setdefault(self.step, []).extend(batch["ids"].tolist())
            here = (self.step, dist.get_rank())
            if here == self._job.nan_at:
                return Loss(loss.total * float("nan"), loss.count)
            if here == self._job.infinite_gradient_at:
                return Loss(loss.total + (loss.total - loss.total).sqrt(), loss.count)
        return loss

    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        return [{"id": int(number)} for number in batch["ids"]]

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        # In the split's order, whichever rank answered.
        assert [answer["id"] for answer in answers] == sorted(answer["id"] for answer in answers)
        return {"answered": float(len(answers)), **_scripted(self.config, self.step)}


def _scripted(config: RunConfig, step: int) -> dict[str, float]:
    """A score that is best at step 4."""
    return {"quality": 1.0 - abs(step - 4) / 10}


class Refusing(ObjectStore):
    """A store that can refuse a manifest."""

    refused_step: int | None = None

    def put(self, key: str, data: Any, *, create: bool = False) -> None:
        if self.refused_step is not None and key.endswith(f"step-{self.refused_step:08d}/manifest.json"):
            raise StoreError("refused")
        super().put(key, data, create=create)


@dataclass(frozen=True)
class Job:
    """A run to be made on all ranks.

    Attributes:
        config: The file.
        folder: Where its store and its records are.
        num_examples: Of the training split.
        num_validation: Of the validation split.
        resume_step: Step of the version to go on from.
        stop_at: (step, rank) at which that rank is asked to stop.
        kill_at: (step, rank) at which that rank's process ends without a word.
        raise_at: (step, rank) at which that rank raises a `ValueError`.
        hang_at: (step, rank) at which that rank sleeps, longer than the others wait.
        hang_in_save: Rank that sleeps so in the save of the last step.
        abandon_at: Step at which every rank raises `Abandoned`.
        nan_at: (step, rank) whose loss is NaN.
        infinite_gradient_at: (step, rank) whose loss is finite and its gradient is not.
        unused_parameter: Give the model a parameter that its loss does not depend on.
        refuse_save_of: Step whose manifest the store refuses.
        without_room: Rank that has no room for a copy of what it saves.
        fails: The loop is expected to raise; the error is returned, so that the group of processes lives on.
    """

    config: RunConfig
    folder: str
    num_examples: int = 200
    num_validation: int = 0
    resume_step: int | None = None
    stop_at: tuple[int, int] | None = None
    kill_at: tuple[int, int] | None = None
    raise_at: tuple[int, int] | None = None
    hang_at: tuple[int, int] | None = None
    hang_in_save: int | None = None
    abandon_at: int | None = None
    nan_at: tuple[int, int] | None = None
    infinite_gradient_at: tuple[int, int] | None = None
    unused_parameter: bool = False
    refuse_save_of: int | None = None
    without_room: int | None = None
    fails: bool = False

    def replaced(self, **changes: Any) -> Job:
        return replace(self, **changes)


@dataclass(frozen=True)
class Outcome:
    """What a rank returns.

    Attributes:
        result: Of the loop; None if it was abandoned.
        losses: Logged losses by step (rank 0).
        records: Logged records (rank 0).
        tensors: Weights and optimizer state at the end.
        seen: Row numbers of each training step of this rank.
        saved: Committed or failed saves, and the step before which the loop told of them.
        num_forwards: Forward passes in training.
        num_prunes: How often retention ran here.
        error: What the loop raised.
    """

    result: LoopResult | None
    losses: dict[int, float]
    records: list[MetricRecord]
    tensors: dict[str, Tensor]
    seen: dict[int, list[int]]
    saved: list[tuple[int, SaveResult]]
    num_forwards: int
    num_prunes: int
    error: EaglerayError | None = None


class HangingSaver(CheckpointSaver):
    """A saver that comes back too late."""

    def save(self, **save: Any) -> None:
        time.sleep(HANG_S)
        super().save(**save)


class Abandoned(Exception):
    """The test ends a run in the middle."""


@dataclass
class TestControl:
    """Counts the steps, and ends the run as the job says."""

    __test__ = False
    job: Job
    task: Recording
    records: list[MetricRecord] = field(default_factory=list)
    saves: list[tuple[int, SaveResult]] = field(default_factory=list)

    def stop_requested(self) -> bool:
        self.task.step += 1
        here = (self.task.step, dist.get_rank())
        if here == self.job.kill_at:
            os._exit(9)
        if here == self.job.raise_at:
            raise ValueError("a column is missing")
        if here == self.job.hang_at:
            self.hang()
        if self.task.step == self.job.abandon_at:
            raise Abandoned
        return here == self.job.stop_at

    def hang(self) -> None:
        time.sleep(HANG_S)

    def log(self, record: MetricRecord) -> None:
        self.records.append(record)

    def saved(self, result: SaveResult) -> None:
        self.saves.append((self.task.step, result))


@lru_cache(maxsize=4)
def processor_of(task_name: str) -> Processor:
    """Return the processor of the tests' sentences."""
    task = load_task(make_config(task_name))
    return task.build_processor(examples_of(task_name, 200))


def train(job: Job) -> Outcome:
    """Run the job on this rank, from its checkpoint if it names one."""
    store = Refusing.open(job.folder)
    store.refused_step = job.refuse_save_of
    layout = layout_of(job)
    handle = RunHandle(store, "tiny", 1, 1, f"start{job.resume_step or 0}")
    if not store.exists("runs/tiny/r1/epochs/00000001.json") and dist.get_rank() == 0:
        store.put("runs/tiny/r1/epochs/00000001.json", b"{}")
    processor = processor_of(job.config.task)
    inner = load_task(job.config)
    task = Recording(inner, job)
    task.step = job.resume_step or 0
    control = TestControl(job, task)
    make_saver = CheckpointSaver if dist.get_rank() != job.hang_in_save else HangingSaver
    saver = make_saver(None, handle, layout=layout, config=job.config, timeout_s=20)
    parts, prunes = _parts(job, task, processor, store, saver)
    spec = WorkerSpec(job.config, handle, "unused", layout, job.config.train.max_steps)  # type: ignore[union-attr,arg-type]
    result, raised = None, None
    try:
        result = run_loop(spec, parts, control)
    except Abandoned:
        pass
    except EaglerayError as error:
        if not job.fails:
            raise
        raised = error
    return Outcome(
        result,
        {record.step: record.loss for record in control.records},
        control.records,
        weights_at_the_end(parts, job),
        task.seen,
        control.saves,
        task.num_forwards,
        len(prunes),
        raised,
    )


def failure_of(job: Job) -> tuple[RankFailure, ...]:
    """Run a job that ends in a failure; return what a worker posts (bare, the group would take it for its own)."""
    try:
        train(job)
    except BaseException as error:
        return (RankFailure.of(dist.get_rank(), error),)
    return ()


def weights_at_the_end(parts: Parts, job: Job) -> dict[str, Tensor]:
    """Return the whole weights; those of a pipeline from what it committed last."""
    if job.config.parallel.pipeline_parallel_degree == 1:
        return {name: whole(tensor) for name, tensor in stored_tensors(parts.model).items()}
    step = max(committed_steps(job.folder))
    return Checkpoint.open(ObjectStore.open(job.folder), "tiny", version_name(1, step)).tensors()


def checkpoint_weights_in_layout(job: Job) -> dict[str, Tensor]:
    """Load the weights of a version into a layout; return this rank's stages of it, whole."""
    assert job.resume_step is not None
    layout, processor = layout_of(job), processor_of(job.config.task)
    model, _ = build_unfilled(job.config, processor)
    mesh, plan, options = build_mesh(layout, "cpu", timeout_s=20), parallel_plan(model), ParallelOptions()
    fill, loss = partial(initialize, seed=None), load_task(job.config).loss
    held = model
    if layout.pipeline > 1:
        held = apply_pipeline(
            model, layout, mesh, torch.device("cpu"), plan=plan, options=options, loss=loss, fill=fill
        )
    else:
        apply_layout(model, layout, mesh, torch.device("cpu"), plan=plan, options=options, fill=fill)
    tensors = stored_tensors(held)
    checkpoint = Checkpoint.open(ObjectStore.open(job.folder), "tiny", version_name(1, job.resume_step))
    checkpoint.load_into({f"model.{name}": tensor for name, tensor in tensors.items()})
    return {name: whole(tensor) for name, tensor in tensors.items()}


def degrees_of(layout: Layout) -> dict[str, int]:
    """Return the keys under `parallel` that make a layout."""
    return {
        "data_parallel_replicate_degree": layout.replicate,
        "data_parallel_shard_degree": layout.shard,
        "tensor_parallel_degree": layout.tensor,
        "pipeline_parallel_degree": layout.pipeline,
    }


def layout_of(job: Job) -> Layout:
    """Return the layout that the file asks for."""
    return resolve_layout(job.config.parallel, dist.get_world_size())


def _parts(
    job: Job, task: Recording, processor: Processor, store: ObjectStore, saver: CheckpointSaver
) -> tuple[Parts, list[int]]:
    device = torch.device("cpu")
    model, fill = build_unfilled(job.config, processor)
    if job.unused_parameter:
        model.register_parameter("extra", nn.Parameter(torch.zeros(3)))
    examples = examples_of(job.config.task, job.num_examples + job.num_validation)
    resume = None
    if job.resume_step is not None:
        resume = Checkpoint.open(store, "tiny", version_name(1, job.resume_step))
    prunes: list[int] = []

    def sinks(step: int) -> list[MetricSink]:
        path = store.local_path(f"{run_dir('tiny', 1)}/metrics.jsonl")
        assert path is not None
        return [JsonlFile(path, step)]

    parts = Parts(
        model=model,
        task=task,
        processor=processor,
        train=MemoryRows(task, processor, examples[: job.num_examples]),
        validation=MemoryRows(task, processor, examples[job.num_examples :]),
        device=device,
        mesh=build_mesh(layout_of(job), "cpu", timeout_s=job.config.train.ddp_timeout),  # type: ignore[union-attr]
        exchange=Exchange(job.config.train.ddp_timeout),  # type: ignore[union-attr]
        files=model_files(model, job.config, processor),
        saver=saver,
        fill=fill,
        resume=resume,
        sinks=sinks,
        prune=lambda: prunes.append(task.step),
        has_room=lambda num_bytes: num_bytes == 0 or dist.get_rank() != job.without_room,
    )
    return parts, prunes


@dataclass(frozen=True)
class Gradients:
    """Gradients of the first step, over the global batch, and their norm."""

    tensors: dict[str, Tensor]
    norm: float


def first_gradients(config: RunConfig) -> Gradients:
    """Take one step at a learning rate of zero and return what the optimizer was given."""
    parts, step = _step(config)
    batches = Batches(
        Cursor(len(parts.train), 64, 0),
        parts.train,
        parts.task,
        parts.processor,
        data_coordinate(parts.mesh),
        max_rows=config.train.per_device_train_batch_size,  # type: ignore[union-attr]
    )
    result = step.run(batches.load(1), 0.0, stop=False, saving=False)
    named = parts.model.named_parameters()
    return Gradients({name: p.grad.clone() for name, p in named if p.grad is not None}, float(result.grad_norm))


def evaluate_once(config: RunConfig, count: int) -> dict[str, float]:
    """Score a fresh model with the task's own answers and scores."""
    processor = processor_of(config.task)
    task = load_task(config)
    exchange = Exchange(20.0)
    evaluator = Evaluator(
        task,
        processor,
        MemoryRows(task, processor, examples_of(config.task, count)),
        exchange,
        data_coordinate(build_mesh(Layout(replicate=dist.get_world_size()), "cpu")),
        torch.device("cpu"),
        batch_size=config.train.per_device_eval_batch_size,  # type: ignore[union-attr]
        max_examples=25,
        seed=0,
    )
    return evaluator.run(build_model(config, processor, "cpu"), 1)


def _step(config: RunConfig) -> tuple[Parts, TrainStep]:
    assert config.train is not None
    task, layout, device = load_task(config), Layout(replicate=dist.get_world_size()), torch.device("cpu")
    processor, mesh = processor_of(config.task), build_mesh(layout, "cpu", timeout_s=20)
    model = build_model(config, processor, device)
    rows = MemoryRows(task, processor, examples_of(config.task, 200))
    exchange = Exchange(20.0)
    parts = Parts(model, task, processor, rows, None, device, mesh, exchange, {}, saver=None)  # type: ignore[arg-type]
    called = apply_layout(model, layout, mesh, device)
    optimizer = build_optimizer(model, config.train)
    return parts, TrainStep(called, task, optimizer, config.train, exchange, data_coordinate(mesh), device)


def committed_steps(folder: str) -> list[int]:
    """Return the steps that the store holds a manifest of."""
    names = [path.parent.name for path in Path(folder).glob("models/tiny/*/manifest.json")]
    return sorted(int(name.rsplit("-", 1)[-1]) for name in names)


def logged_steps(folder: str) -> list[int]:
    """Return the steps of metrics.jsonl."""
    lines = (Path(folder) / "runs/tiny/r1/metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def checkpoint_tensors(folder: str, step: int) -> dict[str, Tensor]:
    """Return every tensor of a version, optimizer state included."""
    return Checkpoint.open(ObjectStore.open(folder), "tiny", version_name(1, step)).tensors("")


def with_train(config: RunConfig, **train: Any) -> RunConfig:
    """Return the file with other keys in its `train` section."""
    assert config.train is not None
    return config.model_copy(update={"train": config.train.model_copy(update=train)})
