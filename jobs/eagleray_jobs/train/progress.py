"""How far a run is, and what is due next: values and pure decisions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from eagleray.config.schema import TrainConfig
from eagleray.errors import ConfigError
from eagleray_jobs.train.spec import Outcome


@dataclass(frozen=True, slots=True)
class Goal:
    """What `best` goes by.

    Attributes:
        metric: Name of a score.
        greater_is_better: Its direction.
        threshold: Smallest change that counts as an improvement for early stopping.
    """

    metric: str
    greater_is_better: bool
    threshold: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig, default: tuple[str, bool]) -> Goal:
        """Take the goal of the file, else the task's own.

        A metric whose name ends in `loss` is better when smaller unless the file says otherwise.
        """
        metric = config.metric_for_best_model or default[0]
        greater = config.greater_is_better
        if greater is None:
            greater = default[1] if metric == default[0] else not metric.endswith("loss")
        return cls(metric, greater, config.early_stopping_threshold)

    @property
    def best_metric(self) -> tuple[str, bool]:
        """The metric and its direction, as the manifests record them."""
        return self.metric, self.greater_is_better

    def value(self, scores: Mapping[str, float]) -> float:
        """Return the score that counts.

        Raises:
            ConfigError: The evaluation gives no such score.
        """
        if self.metric not in scores:
            given = ", ".join(sorted(scores))
            raise ConfigError(
                f"train.metric_for_best_model is {self.metric}, but the evaluation gives {given}",
                "name one of these",
            )
        return scores[self.metric]

    def is_better(self, value: float, than: float | None, by: float = 0.0) -> bool:
        """Say whether a score beats another by more than `by`; NaN beats nothing, not even None."""
        if than is None:
            return not math.isnan(value)
        return value - than > by if self.greater_is_better else than - value > by


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run is; stands in `state.json`.

    Attributes:
        step: Optimizer steps done.
        examples_consumed: Examples seen, over all epochs: the position of the cursor.
        scores: Scores of the last evaluation.
        scored_step: The step of that evaluation.
        best_score: Best value of the goal's metric so far.
        best_step: The step it was reached at.
        reference_score: The score that the next one must beat by the threshold.
        evaluations_without_improvement: In a row, up to now.
    """

    step: int = 0
    examples_consumed: int = 0
    scores: dict[str, float] = field(default_factory=dict)
    scored_step: int | None = None
    best_score: float | None = None
    best_step: int | None = None
    reference_score: float | None = None
    evaluations_without_improvement: int = 0

    @property
    def current_scores(self) -> dict[str, float] | None:
        """Scores of these very weights, None if they were not evaluated."""
        return self.scores if self.scored_step == self.step else None

    def after_step(self, num_examples: int) -> Progress:
        """Return the progress after one more optimizer step."""
        return replace(self, step=self.step + 1, examples_consumed=self.examples_consumed + num_examples)

    def after_evaluation(self, scores: dict[str, float], goal: Goal) -> Progress:
        """Return the progress after an evaluation at the current step.

        Raises:
            ConfigError: The goal's metric is not among the scores.
        """
        value = goal.value(scores)
        progress = replace(self, scores=scores, scored_step=self.step)
        if goal.is_better(value, self.best_score):
            progress = replace(progress, best_score=value, best_step=self.step)
        if goal.is_better(value, self.reference_score, by=goal.threshold):
            return replace(progress, reference_score=value, evaluations_without_improvement=0)
        return replace(progress, evaluations_without_improvement=self.evaluations_without_improvement + 1)

    def as_json(self) -> dict[str, Any]:
        """Return what goes into `state.json`; JSON has no NaN."""
        scores = {name: value if math.isfinite(value) else None for name, value in self.scores.items()}
        return asdict(self) | {"scores": scores}

    @classmethod
    def from_json(cls, state: Mapping[str, Any]) -> Progress:
        """Read what `as_json` gave; other keys of `state.json` belong to others."""
        scores = {name: math.nan if value is None else value for name, value in state["scores"].items()}
        return cls(**{name: state[name] for name in cls.__dataclass_fields__} | {"scores": scores})


@dataclass(frozen=True, slots=True)
class Due:
    """What happens after a step.

    Attributes:
        log: Write a record.
        evaluate: Score the validation split.
        save: Commit a checkpoint.
        outcome: Why the run ends here; None: it goes on.
    """

    log: bool
    evaluate: bool
    save: bool
    outcome: Outcome | None


def due_after(config: TrainConfig, step: int, max_steps: int, *, stop: bool, can_evaluate: bool) -> Due:
    """Decide what happens after `step`; equal on every rank, since `stop` is."""
    outcome: Outcome | None = None
    if step >= max_steps:
        outcome = "finished"
    elif stop:
        outcome = "stopped"
    elif config.stop_at_step is not None and step >= config.stop_at_step:
        outcome = "stopped_at_step"
    evaluate = can_evaluate and (step == max_steps or _every(config.eval_steps, step))
    log = evaluate or step == max_steps or _every(config.logging_steps, step)
    return Due(log, evaluate, outcome is not None or _every(config.save_steps, step), outcome)


def outcome_at_start(config: TrainConfig, progress: Progress, max_steps: int) -> Outcome | None:
    """Say why a run that goes on from a checkpoint has nothing left to do, None if it has."""
    if progress.step >= max_steps:
        return "finished"
    if config.stop_at_step is not None and progress.step >= config.stop_at_step:
        return "stopped_at_step"
    return out_of_patience(config, progress)


def out_of_patience(config: TrainConfig, progress: Progress) -> Outcome | None:
    """Say whether early stopping ends the run."""
    patience = config.early_stopping_patience
    is_out = patience is not None and progress.evaluations_without_improvement >= patience
    return "early_stopped" if is_out else None


def _every(interval: int | None, step: int) -> bool:
    return interval is not None and step % interval == 0
