"""Whether `train` on a name that exists goes on, is done, or is refused."""

from __future__ import annotations

from typing import Any

import pytest
from versions_made import config

from eagleray.store.decide import (
    AlreadyFinished,
    Contents,
    Continue,
    Decision,
    Outcome,
    Refuse,
    RunState,
    Start,
    decide,
)

OLD = config().model_dump(mode="json")


def decision(outcome: Outcome | None = None, *, new_run: bool = False, **changes: Any) -> Decision:
    new = config(**changes).model_dump(mode="json")
    return decide(RunState(2, OLD, outcome), new, new_run=new_run)


def test_a_name_without_a_run_begins_one() -> None:
    assert decide(None, OLD, new_run=False) == Start(1)


@pytest.mark.parametrize("outcome", [None, Outcome.INTERRUPTED, Outcome.FAILED, Outcome.SUPERSEDED])
def test_an_unfinished_run_goes_on(outcome: Outcome | None) -> None:
    assert decision(outcome) == Continue(2)


def test_a_finished_run_is_done() -> None:
    assert decision(Outcome.FINISHED) == AlreadyFinished(2)


@pytest.mark.parametrize("outcome", [None, Outcome.FINISHED])
def test_a_longer_run_goes_on_and_says_by_how_much(outcome: Outcome | None) -> None:
    assert decision(outcome, train={"max_steps": 20}) == Continue(2, ("train.max_steps", 10, 20))


def test_a_shorter_run_is_refused() -> None:
    assert decision(train={"max_steps": 5}) == Refuse(2, {"train.max_steps": (10, 5)})


def test_steps_are_not_exchanged_for_epochs() -> None:
    refused = decision(train={"max_steps": None, "num_train_epochs": 3.0})
    assert refused == Refuse(2, {"train.max_steps": (10, None), "train.num_train_epochs": (None, 3.0)})


@pytest.mark.parametrize(
    "changes",
    [
        {"store": "./elsewhere"},
        {"code": ["./mine"]},
        {"parallel": {"data_parallel_replicate_degree": 3}},
        {"resources": {"num_workers": 3}},
        {"serve": {"num_replicas": 2}},
        {"train": {"logging_steps": 1, "eval_steps": 1, "save_steps": 1, "save_total_limit": 1}},
        {"train": {"stop_at_step": 5, "max_failures": 0, "ddp_timeout": 5.0, "report_to": ["tensorboard"]}},
        {"train": {"per_device_train_batch_size": 8, "per_device_eval_batch_size": 8}},
    ],
)
def test_what_does_not_change_the_result_may_change(changes: dict[str, Any]) -> None:
    assert decision(**changes) == Continue(2)
    assert decision(Outcome.FINISHED, **changes) == AlreadyFinished(2)


def test_any_other_change_is_refused_with_its_keys() -> None:
    refused = decision(
        train={"learning_rate": 0.5, "max_steps": 20}, model={"family": "marian", "config": {"d_model": 8}}
    )
    assert refused == Refuse(2, {"model.config.d_model": (None, 8), "train.learning_rate": (5e-05, 0.5)})


def of_files(folder: str) -> dict[str, Any]:
    files = {
        "train": {"source": f"{folder}/train.en", "target": f"{folder}/train.fr"},
        "test": [f"{folder}/a.csv"],
    }
    return config(data=files).model_dump(mode="json")


@pytest.mark.parametrize("outcome", [None, Outcome.FINISHED])
def test_the_same_rows_may_lie_elsewhere(outcome: Outcome | None) -> None:
    state = RunState(2, of_files("/here"), outcome, contents=Contents("a" * 64))
    decided = decide(state, of_files("/there"), new_run=False, contents=Contents("a" * 64))
    assert decided == (Continue(2) if outcome is None else AlreadyFinished(2))


def test_other_rows_in_the_same_place_are_another_file() -> None:
    state = RunState(2, of_files("/here"), None, contents=Contents("a" * 64))
    decided = decide(state, of_files("/here"), new_run=False, contents=Contents("b" * 64))
    assert decided == Refuse(2, {"data": ("content aaaaaaaaaaaa", "content bbbbbbbbbbbb")})


def test_the_same_rows_cut_into_other_splits_are_another_file() -> None:
    new = config(data={"train": "/there/rows.jsonl", "validation_split": 0.2}).model_dump(mode="json")
    old = config(data={"train": "/here/rows.jsonl"}).model_dump(mode="json")
    decided = decide(RunState(2, old, None, Contents("a" * 64)), new, new_run=False, contents=Contents("a" * 64))
    assert decided == Refuse(2, {"data.validation_split": (0.05, 0.2)})


def test_files_whose_content_is_not_known_go_by_their_paths() -> None:
    decided = decide(
        RunState(2, of_files("/here"), None), of_files("/there"), new_run=False, contents=Contents("b" * 64)
    )
    assert isinstance(decided, Refuse)
    assert list(decided.changes) == ["data.test", "data.train.source", "data.train.target"]


def of_pretrained(place: str, revision: str | None = None) -> dict[str, Any]:
    return config(model={"pretrained": place, "revision": revision}).model_dump(mode="json")


@pytest.mark.parametrize("outcome", [None, Outcome.FINISHED])
def test_the_same_pretrained_model_may_lie_elsewhere(outcome: Outcome | None) -> None:
    known = Contents("a" * 64, "c" * 64)
    state = RunState(2, of_pretrained("/here/opus", "v1"), outcome, known)
    decided = decide(state, of_pretrained("/there/opus"), new_run=False, contents=known)
    assert decided == (Continue(2) if outcome is None else AlreadyFinished(2))


def test_another_pretrained_model_in_the_same_place_is_another_file() -> None:
    state = RunState(2, of_pretrained("/here"), None, Contents("a" * 64, "c" * 64))
    decided = decide(state, of_pretrained("/here"), new_run=False, contents=Contents("a" * 64, "d" * 64))
    assert decided == Refuse(2, {"model.pretrained": ("content cccccccccccc", "content dddddddddddd")})


def test_a_pretrained_model_whose_content_was_not_recorded_goes_by_its_place() -> None:
    state = RunState(2, of_pretrained("/here"), None, Contents("a" * 64))
    decided = decide(state, of_pretrained("/there"), new_run=False, contents=Contents("a" * 64, "c" * 64))
    assert decided == Refuse(2, {"model.pretrained": ("/here", "/there")})


@pytest.mark.parametrize("outcome", [None, Outcome.FINISHED])
def test_a_new_run_may_be_anything(outcome: Outcome | None) -> None:
    assert decision(outcome, new_run=True, train={"learning_rate": 0.5}) == Start(3)
