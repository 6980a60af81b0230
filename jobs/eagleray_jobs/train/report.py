"""What a training run says at its end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from eagleray_jobs.train.spec import Outcome
from eagleray_jobs.train.view import headline

Ended = Outcome | Literal["already_finished"]


@dataclass(frozen=True, slots=True)
class TrainReport:
    """How a run ended.

    Attributes:
        name: Name of the model.
        outcome: Why it ended; `already_finished` when there was nothing to do.
        ref: The last committed version.
        step: Optimizer steps done.
        max_steps: Optimizer steps of the whole run.
        scores: Scores of the last evaluation.
        best_step: The step with the best score, where there was an evaluation.
        best_score: That score.
        store: Where the checkpoints are.
        num_workers: Workers that trained.
        restarts: How often they were restarted.
        phases_s: Seconds of each phase before the first step, and of training.
        profiles: Timelines of some of its steps, in the store: for each a Chrome trace and a picture.
        next_commands: What to type next.
        signal_number: The signal that a stopped run was stopped by.
    """

    name: str
    outcome: Ended
    ref: str | None
    step: int
    max_steps: int
    store: str
    num_workers: int
    scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    best_score: float | None = None
    restarts: int = 0
    phases_s: dict[str, float] = field(default_factory=dict)
    profiles: tuple[str, ...] = ()
    next_commands: tuple[str, ...] = ()
    signal_number: int | None = None

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left to do."""
        return self.outcome in ("finished", "early_stopped", "already_finished")

    def as_json(self) -> dict[str, Any]:
        """Return the report as JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> TrainReport:
        """Read what `as_json` gave, also when another release wrote it."""
        known = {each.name: values[each.name] for each in fields(cls) if each.name in values}
        known |= {name: tuple(known.get(name, ())) for name in ("profiles", "next_commands")}
        return cls(**known)

    def text(self) -> str:
        """Return the report for people."""
        lines = [_HEADLINES[self.outcome].format(name=self.name, step=self.step, max_steps=self.max_steps)]
        lines += [f"  {key:<10} {value}" for key, value in self._rows() if value]
        if self.next_commands:
            lines += ["next:", *(f"  {command}" for command in self.next_commands)]
        return "\n".join(lines)

    def _rows(self) -> list[tuple[str, str]]:
        best = f"{self.best_score:.4f} at step {self.best_step}" if self.best_score is not None else ""
        return [
            ("version", self.ref or ""),
            ("scores", headline(self.scores)),
            ("best", best),
            ("store", self.store),
            ("seconds", ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.phases_s.items())),
            ("profile", ", ".join(f"{self.store}/{key}" for key in self.profiles)),
            ("restarts", str(self.restarts) if self.restarts else ""),
        ]


_HEADLINES: dict[Ended, str] = {
    "finished": "{name}: trained {step} steps",
    "stopped": "{name}: stopped at step {step} of {max_steps}, committed",
    "stopped_at_step": "{name}: stopped at step {step} of {max_steps} (train.stop_at_step), committed",
    "early_stopped": "{name}: stopped early at step {step} of {max_steps}: no more improvement",
    "already_finished": "{name}: this run is finished, there is nothing to do",
}


def next_commands(name: str, outcome: Ended, call: tuple[str, ...]) -> tuple[str, ...]:
    """Return what to type next after `eagleray train CALL`."""
    again = " ".join(call)
    if outcome in ("stopped", "stopped_at_step"):
        return (f"eagleray train {again}",)
    return (f"eagleray serve {again}", f"eagleray predict {name} INPUT OUTPUT", f"eagleray models show {name}")
