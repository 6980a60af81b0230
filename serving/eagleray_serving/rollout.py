"""Which version of a model is served, and what becomes of the next one. Pure: values in, a decision out.

Each step of the state happens in one place, the server's controller, and every replica follows it::

    steady --(a followed reference changes, `serve canary`, a rollback)--> trying
    trying --(a replica refuses it)-----------------------------------------> steady, refused
    trying --(all replicas hold it and have tried it)---> steady with it, or canary
    canary --(`serve promote`)------------------------------------------> steady with it
    canary --(`serve rollback`, or too many errors)---------------------> steady, refused
    steady --(too many errors soon after it took over)---------> trying the version before
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

from eagleray.config.serving import RolloutConfig
from eagleray.errors import UsageError
from eagleray_serving.figures import Figures, total

if TYPE_CHECKING:
    from eagleray.store.registry import VersionInfo

Purpose = Literal["swap", "canary", "rollback"]
Stage = Literal["loading", "ready", "no_room", "refused"]

NUM_KEPT = 20
# Seconds after which a version that not every replica could load is given up.
TRIAL_LIMIT_S = 1800.0
# Seconds after a version took over in which its errors bring the one before back.
WATCH_S = 600.0


@dataclass(frozen=True, slots=True)
class Candidate:
    """A version that is loaded beside the current one.

    Attributes:
        trial: Number of this attempt; the same version may be tried again later.
        version: The version.
        purpose: What becomes of it when every replica has tried it.
        percent: Part of the requests that it gets as a canary.
        since: When the attempt began, in seconds since the epoch.
        is_tried: Whether every replica holds it and has tried it; a canary answers from then on.
        turn: The replica that may unload the current version for it, where both do not fit.
    """

    trial: int
    version: str
    purpose: Purpose
    percent: float
    since: float
    is_tried: bool = False
    turn: str | None = None


@dataclass(frozen=True, slots=True)
class Event:
    """Something that happened to a version.

    Attributes:
        at: When, in seconds since the epoch.
        what: `current`, `canary` or `refused`.
        version: The version.
        reason: Why, for people.
    """

    at: float
    what: Literal["current", "canary", "refused"]
    version: str
    reason: str


@dataclass(frozen=True, slots=True)
class Rollout:
    """What is served of one model, and what happened before; survives every process but the server.

    Attributes:
        current: The version that answers.
        previous: The one before, where a rollback goes.
        candidate: The version that is tried, or a canary.
        followed: What the followed reference stood for when it was last looked at.
        window: Number of the period over which requests are counted; a change of versions begins a new one.
        trial: Number of the last attempt.
        since: When the window began, in seconds since the epoch.
        before: What the previous version did in its last window, while the current one is watched.
        events: The last that happened, oldest first.
    """

    current: str
    previous: str | None = None
    candidate: Candidate | None = None
    followed: str | None = None
    window: int = 0
    trial: int = 0
    since: float = 0.0
    before: Figures | None = None
    events: tuple[Event, ...] = ()

    @property
    def refused(self) -> Event | None:
        """The last refusal."""
        return next((event for event in reversed(self.events) if event.what == "refused"), None)


@dataclass(frozen=True, slots=True)
class Report:
    """What a replica says of itself.

    Attributes:
        replica: Its id.
        beat: Grows with every report.
        loaded: The versions that it holds.
        answering: The version that answers requests outside of a canary; None: they wait.
        canary: The version that answers a part of them.
        trial: The attempt that `stage` is about.
        stage: How far it is with the candidate.
        reason: Why it refused it, or why it does not fit.
        window: What `figures` count.
        figures: Of each version.
    """

    replica: str
    beat: int
    loaded: tuple[str, ...]
    answering: str | None
    trial: int = 0
    stage: Stage = "loading"
    reason: str = ""
    window: int = 0
    figures: Mapping[str, Figures] = field(default_factory=dict)
    canary: str | None = None


def begin(state: Rollout, version: str, purpose: Purpose, now: float, *, percent: float = 0.0) -> Rollout:
    """Have every replica load a version beside the current one and try it."""
    trial = state.trial + 1
    candidate = Candidate(trial, version, purpose, percent, now)
    return replace(state, candidate=candidate, trial=trial)


def decide(state: Rollout, reports: Sequence[Report], policy: RolloutConfig, now: float) -> Rollout:
    """Say what follows from what the replicas report.

    Args:
        state: What is served.
        reports: Of the replicas that are alive; where there is none, nothing was tried and nothing is decided.
        policy: The file's thresholds.
        now: Seconds since the epoch.
    """
    candidate = state.candidate
    if not reports:
        return state
    if candidate is None:
        return _watch(state, reports, policy, now)
    if candidate.is_tried:
        reason = fault(figures_of(state, reports), state.current, candidate.version, policy)
        return state if reason is None else refuse(state, reason, now)
    stages = {each.replica: _stage(each, candidate) for each in reports}
    refusals = [each for each in reports if stages[each.replica] == "refused"]
    if refusals:
        return refuse(state, refusals[0].reason, now)
    if all(stage == "ready" for stage in stages.values()):
        return _accept(state, candidate, figures_of(state, reports), now)
    if now - candidate.since > TRIAL_LIMIT_S:
        waiting = [replica for replica, stage in stages.items() if stage != "ready"]
        return refuse(state, f"{len(waiting)} replicas could not load it within {TRIAL_LIMIT_S:.0f} s", now)
    cramped = [each for each in reports if stages[each.replica] == "no_room"]
    if cramped and candidate.purpose == "canary":
        return refuse(state, cramped[0].reason, now)
    return _give_turn(state, candidate, stages)


def fault(figures: Mapping[str, Figures], current: str, version: str, policy: RolloutConfig) -> str | None:
    """Say why a version fails too often beside the current one; None: it does not, or too little is known."""
    found, beside = figures.get(version, Figures()), figures.get(current, Figures())
    if found.errors < policy.min_errors:
        return None
    limit = beside.error_rate + policy.max_error_rate
    if found.error_rate <= limit:
        return None
    return (
        f"{found.errors} of {found.requests} requests failed, {beside.errors} of {beside.requests} on {current}; "
        f"serve.rollout.max_error_rate is {policy.max_error_rate:g}"
    )


def worse(current: VersionInfo, version: VersionInfo, policy: RolloutConfig) -> str | None:
    """Say why a version is worse than the current one by its score; None: it is not, or none can be compared."""
    by = version.best_metric or current.best_metric
    if by is None or policy.max_score_drop is None:
        return None
    metric, greater_is_better = by
    if metric not in version.metrics:
        return None  # it was saved between two evaluations
    old, new = current.metrics.get(metric), version.metrics[metric]
    if old is None:
        return None
    if new is None:
        return f"it has no finite {metric}, {current.version} has {old:g}"
    drop = (old - new) if greater_is_better else (new - old)
    if drop <= policy.max_score_drop * abs(old):
        return None
    return (
        f"its {metric} is {new:g}, that of {current.version} {old:g}; "
        f"serve.rollout.max_score_drop is {policy.max_score_drop:g} of it"
    )


def canary(state: Rollout, version: str, percent: float, now: float) -> Rollout:
    """Give a part of the requests to a version, once every replica has tried it; or change that part.

    Raises:
        UsageError: It answers already, or another version is on its way.
    """
    candidate = state.candidate
    if version == state.current:
        raise UsageError(f"{version} answers all requests already", "name another version: eagleray models list")
    if candidate is None:
        return begin(state, version, "canary", now, percent=percent)
    if candidate.version != version or candidate.purpose != "canary":
        raise UsageError(
            f"{candidate.version} is on its way ({candidate.purpose})",
            "wait for it, or end it first: eagleray serve rollback NAME",
        )
    changed = replace(state, candidate=replace(candidate, percent=percent))
    return (
        _told(changed, "canary", version, f"{percent:g} % of the requests", now) if candidate.is_tried else changed
    )


def promote(state: Rollout, now: float) -> Rollout:
    """Let the canary take over.

    Raises:
        UsageError: There is none, or it is still being loaded.
    """
    candidate = state.candidate
    if candidate is None or candidate.purpose != "canary":
        raise UsageError("there is no canary", "begin one: eagleray serve canary NAME REF --percent 10")
    if not candidate.is_tried:
        raise UsageError(f"{candidate.version} is still being loaded", "try again soon; serve status shows it")
    return _take_over(state, candidate, "promoted", now)


def roll_back(state: Rollout, now: float) -> Rollout:
    """End the candidate, or where there is none go back to the version before.

    Raises:
        UsageError: There is nothing to go back to.
    """
    if state.candidate is not None:
        return refuse(state, "rolled back", now)
    if state.previous is None:
        raise UsageError(f"{state.current} is the first version of this server", "there is nothing to go back to")
    return begin(state, state.previous, "rollback", now)


def refuse(state: Rollout, reason: str, now: float, version: str | None = None) -> Rollout:
    """Give the candidate up, or a version that did not get so far; the current one goes on."""
    if version is not None:
        return _told(state, "refused", version, reason, now)
    assert state.candidate is not None, "there is nothing to refuse"
    told = _told(state, "refused", state.candidate.version, reason, now)
    return replace(told, candidate=None, window=state.window + 1, since=now)


def figures_of(state: Rollout, reports: Sequence[Report]) -> dict[str, Figures]:
    """Add up what the replicas counted in this window."""
    counted = [each.figures for each in reports if each.window == state.window]
    versions = {version for figures in counted for version in figures}
    return {version: total(figures[version] for figures in counted if version in figures) for version in versions}


def _stage(report: Report, candidate: Candidate) -> Stage:
    return report.stage if report.trial == candidate.trial else "loading"


def _accept(state: Rollout, candidate: Candidate, figures: Mapping[str, Figures], now: float) -> Rollout:
    if candidate.purpose == "rollback":
        return _take_over(state, candidate, "rolled back to it", now)
    if candidate.purpose == "swap":
        swapped = _take_over(state, candidate, "every replica has tried it", now)
        return replace(swapped, before=figures.get(state.current, Figures()))
    told = _told(state, "canary", candidate.version, f"{candidate.percent:g} % of the requests", now)
    return replace(told, candidate=replace(candidate, is_tried=True), window=state.window + 1, since=now)


def _take_over(state: Rollout, candidate: Candidate, reason: str, now: float) -> Rollout:
    told = _told(state, "current", candidate.version, reason, now)
    return replace(
        told,
        current=candidate.version,
        previous=state.current,
        candidate=None,
        before=None,
        window=state.window + 1,
        since=now,
    )


def _watch(state: Rollout, reports: Sequence[Report], policy: RolloutConfig, now: float) -> Rollout:
    """Go back where the current version fails more than the one before did."""
    if state.before is None or state.previous is None:
        return state
    if now - state.since >= WATCH_S:
        return replace(state, before=None)
    figures = {**figures_of(state, reports), state.previous: state.before}
    reason = fault(figures, state.previous, state.current, policy)
    if reason is None:
        return state
    told = _told(state, "refused", state.current, reason, now)
    return replace(begin(told, state.previous, "rollback", now), before=None)


def _give_turn(state: Rollout, candidate: Candidate, stages: Mapping[str, Stage]) -> Rollout:
    """Let one replica after the other swap in place, once all that have room for both are ready."""
    if "loading" in stages.values() or stages.get(candidate.turn or "") == "no_room":
        return state
    waiting = sorted(replica for replica, stage in stages.items() if stage == "no_room")
    return replace(state, candidate=replace(candidate, turn=waiting[0])) if waiting else state


def _told(
    state: Rollout, what: Literal["current", "canary", "refused"], version: str, reason: str, now: float
) -> Rollout:
    return replace(state, events=(*state.events, Event(now, what, version, reason))[-NUM_KEPT:])
