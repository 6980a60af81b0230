"""What the benchmarks of layouts share: a model, its rows, and our training loop in processes without Ray."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from ddp_loop import EncodedRows, NoSaver

from eagleray.config.layout import Layout, parse_layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_unfilled
from eagleray.parallel import build_mesh
from eagleray.store.objects import ObjectStore
from eagleray.store.runs import RunHandle
from eagleray.store.saver import SaveResult
from eagleray.tasks import Processor, Task, load_task
from eagleray_jobs.data.cldr import translation_examples
from eagleray_jobs.data.split import SplitShares
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.loop import run_loop
from eagleray_jobs.train.parts import Parts
from eagleray_jobs.train.spec import MetricRecord, WorkerSpec
from eagleray_jobs.verify.ranks import DeviceType, RankGroup

NUM_ROWS = 2_000
MAX_LENGTH = 128
DEGREES = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "tensor": "tensor_parallel_degree",
    "pipeline": "pipeline_parallel_degree",
}


@dataclass(frozen=True, slots=True)
class Case:
    """One run: a layout of a model, and how many rows and steps.

    Attributes:
        layout: As it is spelled.
        width: Of the model; feed-forward layers are four times as wide, a head is 64 wide.
        num_layers: Of the encoder and of the decoder.
        rows: Examples of a step, over all workers.
        steps: Optimizer steps.
        parallel: Further keys under `parallel`.
        train: Further keys under `train`.
    """

    layout: str
    width: int
    num_layers: int
    rows: int
    steps: int
    parallel: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)

    @property
    def degrees(self) -> Layout:
        """The layout."""
        return parse_layout(self.layout)

    def __str__(self) -> str:
        return (
            f"Translator of width {self.width}, {self.num_layers} + {self.num_layers} layers, "
            f"{self.rows} rows per step"
        )

    def config(self) -> RunConfig:
        """Return the file of the run."""
        sizes = {"d_model": self.width, "max_position_embeddings": MAX_LENGTH, "dropout": 0.0}
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": self.num_layers, f"{side}_ffn_dim": 4 * self.width}
            sizes[f"{side}_attention_heads"] = max(self.width // 64, 4)
        train = {
            "max_steps": self.steps,
            "global_batch_size": self.rows,
            "learning_rate": 1e-3,
            "warmup_steps": 0.1,
        }
        degrees = {key: getattr(self.degrees, axis) for axis, key in DEGREES.items()}
        return RunConfig.model_validate(
            {
                "name": "bench",
                "task": "translation",
                "model": {"family": "marian", "config": sizes, "tokenizer": {"type": "bpe", "vocab_size": 2000}},
                "data": {"source": "cldr-en-fr"},
                "train": train | self.train,
                "parallel": degrees | self.parallel,
            }
        )


@dataclass(frozen=True, slots=True)
class Data:
    """The task's tokenised rows, the same for every model here; they cross to the processes that train.

    Attributes:
        files: Of the processor.
        rows: What is trained on.
    """

    files: dict[str, bytes]
    rows: EncodedRows

    @classmethod
    def prepare(cls) -> Self:
        """Encode rows of the bundled source."""
        task = _task()
        examples = list(islice(translation_examples("en", "fr", SplitShares(0.0, 0.0)), NUM_ROWS))
        processor = task.build_processor(examples)
        return cls(dict(processor.files()), EncodedRows(task, processor, examples))

    def open(self) -> tuple[Task, Processor]:
        """Return the task and its processor."""
        task = _task()
        return task, task.load_processor(self.files)


class FullRows:
    """Rows that are all as long as they may be, so that no step has other shapes."""

    def __init__(self, vocab_size: int, count: int) -> None:
        ids = np.random.default_rng(0).integers(3, vocab_size, (count, 2, MAX_LENGTH)).tolist()
        self._rows = [{"input_ids": source, "labels": target} for source, target in ids]
        self.lengths = np.full(count, MAX_LENGTH)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._rows[index]


def _task() -> Task:
    return load_task(Case("single", 64, 1, 8, 1).config())


@dataclass
class Clock:
    """Notes the begin of each step; for our loop it is a `Control`."""

    moments: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.moments.append(time.perf_counter())

    def stop_requested(self) -> bool:
        self.tick()
        return False

    def log(self, record: MetricRecord) -> None:
        self.losses.append(record.loss)

    def saved(self, result: SaveResult) -> None: ...

    def step_s(self, num_skipped: int) -> float:
        """Mean seconds of a step, the first ones left out."""
        return (self.moments[-1] - self.moments[num_skipped]) / (len(self.moments) - 1 - num_skipped)


def train_ours(
    case: Case,
    data: Data,
    folder: str,
    *,
    probe: Any = None,
    profile: Any = None,
    device: str = "cpu",
    rows: Any = None,
) -> Clock:
    """Run `run_loop` on this rank, from building the model to the last step; nothing is saved."""
    config, clock = case.config(), Clock()
    task, processor = data.open()
    model, fill = build_unfilled(config, processor)
    parts = Parts(
        model=model,
        task=task,
        processor=processor,
        train=data.rows if rows is None else rows,
        validation=None,
        device=torch.device(device),
        mesh=build_mesh(case.degrees, device),
        exchange=Exchange(60.0),
        files={},
        saver=NoSaver(),  # type: ignore[arg-type]
        fill=fill,
        probe=probe,
    )
    run = RunHandle(ObjectStore.open(folder), "bench", 1, 1, "a")
    run_loop(WorkerSpec(config, run, "unused", case.degrees, case.steps, profile), parts, clock)
    return clock


def in_fresh_processes(
    world_size: int, function: Callable[..., Any], *args: Any, device_type: DeviceType = "cpu"
) -> list[Any]:
    """Call a function on every rank of a new group of processes, of one thread each."""
    group = RankGroup(world_size, 120.0, device_type)
    try:
        return group.run(function, *args, timeout_s=300.0)
    finally:
        group.close()


def megabytes(number: float) -> str:
    """Spell bytes in MB."""
    return f"{number / 1e6:.1f}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """Spell smallest and largest."""
    return f"{min(values):.{digits}f} to {max(values):.{digits}f}"
