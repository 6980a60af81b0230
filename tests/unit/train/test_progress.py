"""What is due after a step, what counts as the best score, and when patience ends."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from eagleray.config.schema import TrainConfig
from eagleray.errors import ConfigError
from eagleray_jobs.train.progress import Goal, Progress, due_after, out_of_patience, outcome_at_start

ACCURACY = Goal("accuracy", greater_is_better=True)


def config(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 100, "logging_steps": 10, **keys})


def due(train: TrainConfig, step: int, *, stop: bool = False) -> tuple[bool, bool, bool, str | None]:
    found = due_after(train, step, 100, stop=stop, can_evaluate=True)
    return found.log, found.evaluate, found.save, found.outcome


def evaluated(values: list[float], goal: Goal = ACCURACY) -> Progress:
    progress = Progress()
    for value in values:
        progress = progress.after_step(8).after_evaluation({goal.metric: value}, goal)
    return progress


def test_an_ordinary_step_does_nothing() -> None:
    assert due(config(eval_steps=20, save_steps=30), 7) == (False, False, False, None)


def test_each_interval_counts_for_itself_and_an_evaluation_is_logged() -> None:
    train = config(eval_steps=15, save_steps=30, logging_steps=10)
    assert due(train, 10) == (True, False, False, None)
    assert due(train, 15) == (True, True, False, None)
    assert due(train, 30) == (True, True, True, None)


def test_the_last_step_evaluates_and_saves_without_being_told() -> None:
    assert due(config(logging_steps=33), 100) == (True, True, True, "finished")


def test_a_stop_commits_and_evaluates_only_what_is_due_anyway() -> None:
    assert due(config(eval_steps=20), 7, stop=True) == (False, False, True, "stopped")
    assert due(config(eval_steps=7), 7, stop=True) == (True, True, True, "stopped")
    assert due(config(), 100, stop=True)[3] == "finished"


def test_stop_at_step() -> None:
    assert due(config(stop_at_step=7), 6)[3] is None
    assert due(config(stop_at_step=7), 7)[2:] == (True, "stopped_at_step")


def test_a_resumed_run_with_nothing_left_ends_at_once() -> None:
    assert outcome_at_start(config(), Progress(step=99), 100) is None
    assert outcome_at_start(config(), Progress(step=100), 100) == "finished"
    assert outcome_at_start(config(stop_at_step=7), Progress(step=7), 100) == "stopped_at_step"
    patient = config(early_stopping_patience=2, eval_steps=10)
    assert outcome_at_start(patient, Progress(step=9, evaluations_without_improvement=2), 100) == "early_stopped"


def test_the_best_score_and_its_step() -> None:
    progress = evaluated([0.5, 0.9, 0.7])
    assert (progress.best_score, progress.best_step, progress.scores) == (0.9, 2, {"accuracy": 0.7})
    smaller = Goal("loss", greater_is_better=False)
    assert evaluated([0.5, 0.9, 0.4], smaller).best_step == 3


def test_nan_is_never_better_than_a_number() -> None:
    assert evaluated([0.5, math.nan]).best_step == 1
    assert evaluated([math.nan, 0.5]).best_step == 2


def test_patience_counts_evaluations_in_a_row() -> None:
    train = config(early_stopping_patience=2, eval_steps=10)
    assert out_of_patience(train, evaluated([0.5, 0.4])) is None
    assert out_of_patience(train, evaluated([0.5, 0.4, 0.6, 0.6])) is None
    assert out_of_patience(train, evaluated([0.5, 0.4, 0.5])) == "early_stopped"
    assert out_of_patience(config(), evaluated([0.5, 0.4, 0.5])) is None


def test_many_small_steps_within_the_threshold_add_up_to_an_improvement() -> None:
    goal = Goal("accuracy", greater_is_better=True, threshold=0.1)
    assert evaluated([0.5, 0.55], goal).evaluations_without_improvement == 1
    assert evaluated([0.5, 0.55, 0.61], goal).evaluations_without_improvement == 0


def test_scores_belong_to_the_step_they_were_made_at() -> None:
    progress = evaluated([0.5])
    assert progress.current_scores == {"accuracy": 0.5}
    assert progress.after_step(8).current_scores is None


def test_progress_survives_json() -> None:
    progress = evaluated([0.5, 0.25])
    assert Progress.from_json(json.loads(json.dumps(progress.as_json()))) == progress


def test_the_goal_is_the_files_else_the_tasks() -> None:
    assert Goal.of(config(), ("f1", True)) == Goal("f1", True)
    assert Goal.of(config(metric_for_best_model="eval_loss"), ("f1", True)) == Goal("eval_loss", False)
    assert Goal.of(config(metric_for_best_model="bleu"), ("loss", False)) == Goal("bleu", True)
    given = config(metric_for_best_model="ter", greater_is_better=False)
    assert Goal.of(given, ("loss", False)) == Goal("ter", False)


def test_a_metric_that_no_evaluation_gives_is_named_with_those_that_it_gives() -> None:
    with pytest.raises(ConfigError, match=r"metric_for_best_model is f2, but the evaluation gives accuracy, f1"):
        Goal("f2", True).value({"f1": 0.5, "accuracy": 0.5})
