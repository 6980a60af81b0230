"""What the training benchmark compares, what a run gives, and the tables that are made of it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from results_page import markdown_table

ROWS, MANY_ROWS = 32, 128
"""Rows per worker and step: as the shipped file has them, and enough for the steps to be computation."""

HAND_TARGET, SCALING_TARGET, SAVE_TARGET = 0.97, 1.85, 0.03
LOGGING_STEPS = 10
PHASES = ("claim", "start Ray", "prepare data", "start workers", "load model", "first step")

Kind = Literal["eagleray", "by hand", "apart", "Trainer"]


@dataclass(frozen=True, slots=True)
class Side:
    """One thing that is measured once per round."""

    kind: Kind
    num_workers: int = 2
    rows: int = ROWS
    saves: bool = False

    @property
    def name(self) -> str:
        """A name for files and for the store."""
        kind = self.kind.replace(" ", "-").lower()
        return f"{kind}-{self.num_workers}x{self.rows}{'-saving' if self.saves else ''}"

    @property
    def batch_size(self) -> int:
        """Examples of one step, over all workers."""
        return self.rows * self.num_workers


OURS, SAVING, BY_HAND, TRAINER = Side("eagleray"), Side("eagleray", saves=True), Side("by hand"), Side("Trainer")
TWO, ONE = (Side("eagleray", number, MANY_ROWS) for number in (2, 1))
TWO_BY_HAND, ONE_BY_HAND = (Side("by hand", number, MANY_ROWS) for number in (2, 1))
APART = Side("apart", 2, MANY_ROWS)
# The first one prepares the data. What is compared stands side by side: the speed of a machine drifts.
SIDES = (OURS, BY_HAND, SAVING, TRAINER, TWO, ONE, TWO_BY_HAND, ONE_BY_HAND, APART)


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        num_rounds: Rounds of all sides.
        num_steps: Steps of a run with the shipped file's rows.
        num_skipped: First steps that are left out of the speed.
        num_large_steps: Steps of a run with many rows, as many of them left out.
        save_steps: Steps between two saves of the side that saves; the steps that count are whole periods of it.
    """

    num_rounds: int = 3
    num_steps: int = 130
    num_skipped: int = 30
    num_large_steps: int = 70
    save_steps: int = 50

    def steps_of(self, side: Side) -> int:
        """Return the steps of a run."""
        return self.num_steps if side.rows == ROWS else self.num_large_steps


QUICK = Plan(num_rounds=1, num_steps=30, num_skipped=10, num_large_steps=20, save_steps=10)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave.

    Attributes:
        steps_per_s: Speed after the skipped steps.
        first_step_s: Seconds from the command to the end of the first step.
        phases_s: Seconds of each phase before that; ours only.
    """

    steps_per_s: float
    first_step_s: float
    phases_s: Mapping[str, float] = field(default_factory=dict)


Measured = dict[Side, list[Run]]
"""The runs of each side, one per round."""


def make_config(shipped: Mapping[str, Any], side: Side, plan: Plan, name: str, store: Path) -> dict[str, Any]:
    """Return the file that a side trains: the shipped one, with as many rows per worker however many there are."""
    train = {key: shipped["train"][key] for key in ("learning_rate", "lr_scheduler_type", "warmup_steps")}
    train |= {"max_steps": plan.steps_of(side), "logging_steps": LOGGING_STEPS}
    train |= {"global_batch_size": side.batch_size, "per_device_train_batch_size": side.rows}
    if side.saves:
        train["save_steps"] = plan.save_steps
    # All rows train: an evaluation at the end would only take time.
    data = shipped["data"] | {"validation_split": 0.0, "test_split": 0.0}
    parallel = {"data_parallel_replicate_degree": side.num_workers}
    own = {"name": name, "store": str(store), "data": data, "train": train, "parallel": parallel}
    return {**shipped, **own}


def logged_steps_per_s(records: Sequence[Mapping[str, Any]], num_skipped: int, batch_size: int) -> float:
    """Return the speed after the skipped steps, from the lines of `metrics.jsonl`."""
    seconds, before = 0.0, 0
    for record in records:
        if before >= num_skipped:
            seconds += (record["step"] - before) * batch_size / record["examples_per_s"]
        before = record["step"]
    return float((before - num_skipped) / seconds)


def median(runs: Sequence[Run]) -> float:
    """Return the median speed in steps per second."""
    return statistics.median(run.steps_per_s for run in runs)


def ratio(runs: Measured, of: Side, to: Side) -> float:
    """Return the median over the rounds of the ratio of two speeds."""
    pairs = zip(runs[of], runs[to], strict=True)
    return statistics.median(one.steps_per_s / other.steps_per_s for one, other in pairs)


def speed_table(runs: Measured) -> str:
    """Answer how fast the steps are."""
    rows = [["eagleray train", *_speed(runs[OURS]), "", ""]]
    for side, label, target in (
        (BY_HAND, "DDP loop by hand, torchrun", f">= {HAND_TARGET}"),
        (TRAINER, "transformers Trainer, torchrun", "> 1"),
    ):
        rows.append([label, *_speed(runs[side]), f"{ratio(runs, OURS, side):.3f}", target])
    return markdown_table(
        [f"2 workers, one thread and {ROWS} rows each", "steps/s", "slowest to fastest", "ours / peer", "target"],
        rows,
    )


def scaling_table(runs: Measured) -> str:
    """Answer what a second worker gives."""
    rows = []
    for label, one, two, target in (
        ("eagleray train", ONE, TWO, f">= {SCALING_TARGET}"),
        ("DDP loop by hand, torchrun", ONE_BY_HAND, TWO_BY_HAND, ""),
        ("the same, exchanging nothing", ONE_BY_HAND, APART, ""),
    ):
        speeds = [f"{median(runs[side]) * side.batch_size:.0f}" for side in (one, two)]
        rows.append([label, *speeds, f"{ratio(runs, two, one) * two.batch_size / one.batch_size:.2f}", target])
    headers = [f"{MANY_ROWS} rows per worker and step", "examples/s of 1", "of 2", "2 / 1", "target"]
    return markdown_table(headers, rows)


def save_table(runs: Measured, plan: Plan) -> str:
    """Answer what saves cost the steps."""
    cost = 1 - ratio(runs, SAVING, OURS)
    rows = [
        ["never", *_speed(runs[OURS]), "", ""],
        [f"every {plan.save_steps} steps", *_speed(runs[SAVING]), f"{cost:.1%}", f"< {SAVE_TARGET:.0%}"],
    ]
    return markdown_table(["saves of eagleray train", "steps/s", "slowest to fastest", "cost", "target"], rows)


def start_table(runs: Measured) -> str:
    """Answer how long the first step is in coming, and why."""
    first, *later = [*runs[OURS], *runs[SAVING]]
    groups = [[first], later]
    rows = [["start Python, import, read the file", *(_seconds(map(_before, group)) for group in groups), "", ""]]
    for phase in PHASES:
        rows.append([phase, *(_seconds(run.phases_s[phase] for run in group) for group in groups), "", ""])
    groups += [runs[BY_HAND], runs[TRAINER]]
    totals = [_seconds(run.first_step_s for run in group) for group in groups]
    rows.append(["command to the end of the first step", *totals])
    headers = ["seconds", "first run", "data prepared", "DDP loop by hand", "Trainer"]
    return markdown_table(headers, rows)


def report(runs: Measured, plan: Plan, machine: str) -> str:
    """Return the tables in Markdown."""
    steps = f"{plan.num_skipped + 1} to {plan.num_steps} (to {plan.num_large_steps} with {MANY_ROWS} rows)"
    about = (
        f"{machine}. Medians of {plan.num_rounds} interleaved rounds; speeds are of steps {steps}; a ratio is the "
        "median of the rounds' ratios."
    )
    tables = (speed_table(runs), scaling_table(runs), save_table(runs, plan), start_table(runs))
    return "\n\n".join([about, *tables])


def _speed(runs: Sequence[Run]) -> tuple[str, str]:
    speeds = [run.steps_per_s for run in runs]
    return f"{statistics.median(speeds):.2f}", f"{min(speeds):.2f} to {max(speeds):.2f}"


def _seconds(values: Iterable[float]) -> str:
    return f"{statistics.median(values):.1f}"


def _before(run: Run) -> float:
    """Return what no phase of the driver counts."""
    return run.first_step_s - sum(run.phases_s.values())
