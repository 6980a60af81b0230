"""The policy of a rollout: values in, a decision out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from eagleray.config.serving import RolloutConfig
from eagleray.errors import UsageError
from eagleray.store.registry import VersionInfo
from eagleray_serving import rollout
from eagleray_serving.commanding import answers_alone, divides_for
from eagleray_serving.figures import Figures
from eagleray_serving.rollout import Report, Rollout, Stage, decide
from eagleray_serving.views import summary, view

POLICY = RolloutConfig()
START = Rollout("v1", followed="v1")


def report(replica: str, stage: Stage, trial: int = 1, **more: Any) -> Report:
    return Report(replica, 1, ("v1",), more.pop("answering", "v1"), trial, stage, **more)


def test_a_version_takes_over_once_every_replica_has_tried_it() -> None:
    trying = rollout.begin(START, "v2", "swap", 10)
    for stages in ([], ["loading"], ["ready", "loading"]):
        waiting = decide(trying, [report(str(i), stage) for i, stage in enumerate(stages)], POLICY, 11)
        assert waiting == trying
    done = decide(trying, [report("a", "ready"), report("b", "ready")], POLICY, 12)
    assert (done.current, done.previous, done.candidate) == ("v2", "v1", None)
    assert (done.window, done.events[-1].what, done.events[-1].at) == (trying.window + 1, "current", 12)


def test_what_a_replica_said_of_an_earlier_attempt_counts_for_nothing() -> None:
    again = rollout.begin(rollout.refuse(rollout.begin(START, "v2", "swap", 1), "no", 2), "v2", "swap", 3)
    assert decide(again, [report("a", "refused", trial=1), report("b", "ready", trial=2)], POLICY, 4) == again


def test_one_refusal_ends_the_attempt_and_the_current_version_goes_on() -> None:
    trying = rollout.begin(START, "v2", "swap", 10)
    found = decide(trying, [report("a", "ready"), report("b", "refused", reason="it is damaged")], POLICY, 11)
    assert (found.current, found.candidate) == ("v1", None)
    assert found.refused is not None
    assert (found.refused.version, found.refused.reason) == ("v2", "it is damaged")


def test_an_attempt_that_never_ends_is_given_up() -> None:
    trying = rollout.begin(START, "v2", "swap", 10)
    late = decide(trying, [report("a", "loading")], POLICY, 11 + rollout.TRIAL_LIMIT_S)
    assert late.refused is not None and "1 replicas could not load it within 1800 s" in late.refused.reason


def test_without_room_replicas_swap_in_place_one_after_the_other_and_the_others_first() -> None:
    state = rollout.begin(START, "v2", "swap", 0)
    assert decide(state, [report("a", "loading"), report("b", "no_room")], POLICY, 1) == state
    turns = []
    stages: dict[str, Stage] = {"a": "ready", "b": "no_room", "c": "no_room"}
    for _ in range(2):
        state = decide(state, [report(name, stage) for name, stage in stages.items()], POLICY, 1)
        assert state.candidate is not None and state.candidate.turn is not None
        turns.append(state.candidate.turn)
        # Its turn lasts while it has not begun, while it loads, and until it is ready.
        assert decide(state, [report(name, stage) for name, stage in stages.items()], POLICY, 1) == state
        stages[turns[-1]] = "loading"
        assert decide(state, [report(name, stage) for name, stage in stages.items()], POLICY, 1) == state
        stages[turns[-1]] = "ready"
    assert turns == ["b", "c"]
    assert decide(state, [report(name, stage) for name, stage in stages.items()], POLICY, 1).current == "v2"


def test_the_turn_of_a_replica_that_died_goes_to_the_next() -> None:
    state = rollout.begin(START, "v2", "swap", 0)
    both = decide(state, [report("a", "no_room"), report("b", "no_room")], POLICY, 1)
    assert both.candidate is not None and both.candidate.turn == "a"
    alone = decide(both, [report("b", "no_room")], POLICY, 2)
    assert alone.candidate is not None and alone.candidate.turn == "b"


def test_a_canary_needs_room_for_both_versions() -> None:
    state = rollout.canary(START, "v2", 10, 0)
    found = decide(state, [report("a", "no_room", reason="needs 3 GB")], POLICY, 1)
    assert found.refused is not None and found.refused.reason == "needs 3 GB"


def begun_canary() -> Rollout:
    state = decide(rollout.canary(START, "v2", 10, 0), [report("a", "ready")], POLICY, 1)
    assert state.candidate is not None and state.candidate.is_tried
    return state


def counted(state: Rollout, v1: tuple[int, int], v2: tuple[int, int]) -> list[Report]:
    figures = {"v1": Figures(*v1), "v2": Figures(*v2)}
    return [report("a", "ready", window=state.window, figures=figures)]


@pytest.mark.parametrize(
    "v1, v2, is_ended",
    [
        ((900, 0), (100, 0), False),
        ((900, 0), (4, 4), False),  # too few errors to be judged
        ((900, 0), (100, 5), False),  # at the limit
        ((900, 0), (100, 6), True),
        ((900, 450), (100, 54), False),  # the requests are at fault: both versions fail them
        ((900, 450), (100, 56), True),
        ((0, 0), (5, 5), True),  # nothing to compare with
    ],
)
def test_a_canary_is_taken_back_when_it_fails_more_than_the_current_version(
    v1: tuple[int, int], v2: tuple[int, int], is_ended: bool
) -> None:
    state = begun_canary()
    found = decide(state, counted(state, v1, v2), POLICY, 2)
    assert (found.candidate is None) == is_ended
    assert found.current == "v1"
    if is_ended:
        assert found.refused is not None and f"{v2[1]} of {v2[0]} requests failed" in found.refused.reason


@pytest.mark.parametrize(
    "before, after, late_s, is_undone",
    [
        (Figures(900, 0), Figures(100, 50), 1, True),
        (Figures(900, 450), Figures(100, 50), 1, False),
        (Figures(900, 0), Figures(100, 50), rollout.WATCH_S, False),
    ],
)
def test_a_version_that_fails_soon_after_it_took_over_is_taken_back(
    before: Figures, after: Figures, late_s: float, is_undone: bool
) -> None:
    trying = rollout.begin(START, "v2", "swap", 0)
    state = decide(trying, [report("a", "ready", figures={"v1": before})], POLICY, 1)
    now = [report("a", "ready", window=state.window, figures={"v2": after})]
    found = decide(state, now, POLICY, 1 + late_s)
    if not is_undone:
        assert (found.current, found.candidate) == ("v2", None)
        return
    assert found.candidate is not None and found.refused is not None
    assert (found.candidate.version, found.candidate.purpose, found.refused.version) == ("v1", "rollback", "v2")
    back = decide(found, [report("a", "ready", trial=found.trial)], POLICY, 3)
    assert (back.current, back.candidate, back.before) == ("v1", None, None)


def test_figures_of_another_window_are_not_counted() -> None:
    state = begun_canary()
    stale = [replace(each, window=state.window - 1) for each in counted(state, (0, 0), (50, 50))]
    assert decide(state, stale, POLICY, 2) == state


def test_a_canary_is_promoted_or_rolled_back_and_a_swap_can_be_undone() -> None:
    state = begun_canary()
    promoted = rollout.promote(state, 3)
    assert (promoted.current, promoted.previous, promoted.candidate) == ("v2", "v1", None)
    ended = rollout.roll_back(state, 3)
    assert (ended.current, ended.candidate) == ("v1", None)
    back = rollout.roll_back(promoted, 4)
    assert back.candidate is not None and (back.candidate.version, back.candidate.purpose) == ("v1", "rollback")
    undone = decide(back, [report("a", "ready", trial=back.trial)], POLICY, 5)
    assert (undone.current, undone.previous) == ("v1", "v2")


def test_commands_that_make_no_sense_say_what_to_do() -> None:
    loading = rollout.canary(START, "v2", 10, 0)
    for command, message in (
        (lambda: rollout.promote(START, 0), "there is no canary"),
        (lambda: rollout.promote(loading, 0), "v2 is still being loaded"),
        (lambda: rollout.roll_back(START, 0), "v1 is the first version of this server"),
        (lambda: rollout.canary(START, "v1", 10, 0), "v1 answers all requests already"),
        (lambda: rollout.canary(loading, "v3", 10, 0), r"v2 is on its way \(canary\)"),
    ):
        with pytest.raises(UsageError, match=message):
            command()


def test_the_share_of_a_canary_changes_without_counting_anew() -> None:
    state = begun_canary()
    more = rollout.canary(state, "v2", 50, 3)
    assert more.candidate is not None
    assert (more.candidate.percent, more.candidate.is_tried, more.window) == (50, True, state.window)


def info(version: str, **metrics: float | None) -> VersionInfo:
    return VersionInfo("m", version, 1, 1, metrics=metrics, best_metric=("chrf", True))


@pytest.mark.parametrize(
    "old, new, drop, is_worse",
    [
        ({"chrf": 50.0}, {"chrf": 47.6}, 0.05, False),
        ({"chrf": 50.0}, {"chrf": 47.4}, 0.05, True),
        ({"chrf": 50.0}, {"chrf": 10.0}, None, False),
        ({}, {"chrf": 10.0}, 0.05, False),
        ({"chrf": 50.0}, {"chrf": None}, 0.05, True),
        ({"chrf": 50.0}, {}, 0.05, False),
        ({"chrf": 50.0}, {"chrf": 50.0}, 0.0, False),
    ],
)
def test_worse_is_a_score_that_dropped_by_more_than_the_share(
    old: dict[str, float], new: dict[str, float | None], drop: float | None, is_worse: bool
) -> None:
    found = rollout.worse(info("v1", **old), info("v2", **new), RolloutConfig(max_score_drop=drop))
    assert (found is not None) == is_worse


def test_worse_goes_by_the_direction_of_the_score() -> None:
    old = replace(info("v1", loss=1.0), best_metric=("loss", False))
    new = replace(info("v2", loss=1.1), best_metric=("loss", False))
    found = rollout.worse(old, new, POLICY)
    assert found == "its loss is 1.1, that of v1 1; serve.rollout.max_score_drop is 0.05 of it"
    assert rollout.worse(new, old, POLICY) is None


def test_a_change_is_done_once_the_last_replica_divides_or_no_longer_divides_requests() -> None:
    state = begun_canary()
    both = [replace(report("a", "ready"), canary="v2"), report("b", "ready")]
    assert not divides_for("v2")(view(state, both))
    assert divides_for("v2")(view(state, [both[0], replace(both[1], canary="v2")]))
    back = rollout.roll_back(state, 9)
    assert not answers_alone("v1")(view(back, both))
    assert answers_alone("v1")(view(back, [replace(both[0], canary=None), both[1]]))


def test_what_is_shown_names_versions_shares_figures_and_refusals() -> None:
    state = begun_canary()
    shown = view(state, counted(state, (90, 0), (10, 1)), "production")
    assert (shown["current"], shown["canary"]) == ("v1", {"version": "v2", "percent": 10})
    assert (shown["requests"]["v2"]["requests"], shown["requests"]["v2"]["errors"]) == (10, 1)
    assert shown["replicas"] == {"v1": 1}
    assert "canary v2 10 %; follows production" in summary(shown | {"requests": {}})
    ended = view(rollout.refuse(state, "it failed", 9), [])
    assert summary(ended) == "v1; refused v2: it failed"
