"""What crosses between the driver and the training workers, and the seam through which a worker is steered."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig, TrainConfig
from eagleray.errors import ConfigError
from eagleray.store.runs import RunHandle

if TYPE_CHECKING:  # it brings torch, which the board's process does without
    from eagleray.store.saver import SaveResult

Outcome = Literal["finished", "stopped", "stopped_at_step", "early_stopped"]
"""Why the loop ended: all steps done, a stop was asked for, `train.stop_at_step`, no more improvement."""


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """Everything a training worker is told; it finds the checkpoint to go on from in the store by itself.

    Attributes:
        config: The whole file.
        run: What the workers commit under.
        data_fingerprint: Prepared data, `data/<fingerprint>/` in the run's store.
        layout: The resolved degrees; their product is the number of workers.
        max_steps: Optimizer steps of the whole run (epochs are resolved by `schedule.num_steps`).
        profile: Record some steps although the file names none: passes alone, or collectives as well.
    """

    config: RunConfig
    run: RunHandle
    data_fingerprint: str
    layout: Layout
    max_steps: int
    profile: Literal["passes", "collectives"] | None = None

    @property
    def train(self) -> TrainConfig:
        """The `train` section, which a training run has."""
        if self.config.train is None:
            raise ConfigError(f"{self.config.name}: there is no `train` section", "add one with max_steps")
        return self.config.train


@dataclass(frozen=True, slots=True)
class MetricRecord:
    """One line of `metrics.jsonl`; no step has two.

    Attributes:
        step: Optimizer steps done, this one included.
        epoch: Examples consumed, in passes over the training split.
        loss: Loss of this step over the global batch.
        learning_rate: Learning rate of this step.
        grad_norm: Norm of the whole gradient before clipping.
        examples_per_s: Examples of all workers per second since the last record, evaluations left out.
        tokens_per_s: Tokens of all workers per second, likewise.
        memory_bytes: Peak memory on the device of rank 0; on a CPU the resident set of its process.
        scores: Scores of the evaluation at this step, where there was one.
    """

    step: int
    epoch: float
    loss: float
    learning_rate: float
    grad_norm: float
    examples_per_s: float
    tokens_per_s: float
    memory_bytes: int
    scores: dict[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the record as JSON, which has no NaN; without `scores` where there was no evaluation."""
        values = {key: _finite(value) for key, value in asdict(self).items() if key != "scores"}
        if self.scores is None:
            return values
        return values | {"scores": {name: _finite(value) for name, value in self.scores.items()}}


@dataclass(frozen=True, slots=True)
class LoopResult:
    """How the loop ended; equal on every rank.

    Attributes:
        outcome: Why it ended.
        step: Optimizer steps done.
        ref: The last committed version, None if none was ever committed.
        scores: Scores of the last evaluation.
        best_score: Best value of the metric that `best` goes by, None without an evaluation.
        best_step: The step it was reached at.
    """

    outcome: Outcome
    step: int
    ref: str | None
    scores: dict[str, float] = field(default_factory=dict)
    best_score: float | None = None
    best_step: int | None = None


class Control(Protocol):
    """How the loop talks to whoever launched it: Ray Train's worker, or a test.

    No method may block: the loop calls them between two steps, and every other worker waits meanwhile.
    """

    def stop_requested(self) -> bool:
        """Say whether the run should commit and end. Asked on every rank at every step; one yes is enough."""
        ...

    def log(self, record: MetricRecord) -> None:
        """Take a record, on rank 0, at every logged step."""
        ...

    def saved(self, result: SaveResult) -> None:
        """Learn how a save ended: on every rank, between the same two steps, in the same order."""
        ...


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
