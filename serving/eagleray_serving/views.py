"""The versions of a model as people and programs see them: in `/v1/models` and `serve status`. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from eagleray_serving.rollout import Event, Report, Rollout, figures_of

NUM_SHOWN = 5


def view(
    state: Rollout, reports: Sequence[Report], follow: str | None = None, complaint: str | None = None
) -> dict[str, Any]:
    """Return what is served of a model and what is known of it.

    Args:
        state: What the controller decided.
        reports: Of the living replicas.
        follow: The reference that is followed.
        complaint: Why it cannot be looked at.
    """
    candidate = state.candidate
    shown: dict[str, Any] = {
        "current": state.current,
        "previous": state.previous,
        "follow": follow,
        "canary": None,
        "loading": None,
        "refused": None if state.refused is None else _event(state.refused),
        "replicas": dict(Counter(each.answering or "none" for each in reports)),
        "dividing": sum(each.canary is not None for each in reports),
        "since": _time(state.since),
        "requests": {version: each.as_json() for version, each in sorted(figures_of(state, reports).items())},
        "events": [_event(event) for event in state.events[-NUM_SHOWN:]],
    }
    if complaint is not None:
        shown["problem"] = complaint
    if candidate is not None and candidate.is_tried:
        shown["canary"] = {"version": candidate.version, "percent": candidate.percent}
    elif candidate is not None:
        stages = Counter(each.stage if each.trial == candidate.trial else "loading" for each in reports)
        shown["loading"] = {
            "version": candidate.version,
            "purpose": candidate.purpose,
            "replicas": dict(stages),
            "trial": candidate.trial,
        }
    return shown


def summary(shown: dict[str, Any]) -> str:
    """Return a view in one line."""
    words = [shown["current"]]
    if canary := shown["canary"]:
        words.append(f"canary {canary['version']} {canary['percent']:g} %")
    if loading := shown["loading"]:
        words.append(f"loading {loading['version']}")
    if shown["follow"]:
        words.append(f"follows {shown['follow']}")
    for version, figures in shown["requests"].items():
        if figures["requests"]:
            words.append(
                f"{version}: {figures['requests']} requests, {figures['errors']} errors, "
                f"p50 {figures['p50_ms']:g} ms, p95 {figures['p95_ms']:g} ms"
            )
    if refused := shown["refused"]:
        words.append(f"refused {refused['version']}: {refused['reason']}")
    if problem := shown.get("problem"):
        words.append(f"problem: {problem}")
    return "; ".join(words)


def _event(event: Event) -> dict[str, Any]:
    return {**asdict(event), "at": _time(event.at)}


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
