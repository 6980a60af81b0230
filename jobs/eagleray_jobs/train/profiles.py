"""Timelines of runs in the store."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from eagleray.store.objects import ObjectStore
from eagleray_jobs.train.trace import RankTimeline, bubbles, chrome_trace, picture

FOLDER = "profile"


def write_profile(
    store: ObjectStore, folder: str, about: dict[str, Any], ranks: Sequence[RankTimeline], steps: range
) -> None:
    """Write trace and picture into a run's folder of the store."""
    name = f"{folder}/{FOLDER}/steps-{steps[0]:08d}-{steps[-1]:08d}"
    about = about | {"first_step": steps[0], "last_step": steps[-1]}
    title = f"{about['run']}, {about['layout']}: steps {steps[0]} to {steps[-1]}"
    if shares := bubbles(ranks):
        about = about | dict(zip(("bubble", "ideal_bubble"), shares, strict=True))
        title += "; bubble of the pipeline {:.1%}, of equal stages {:.1%}".format(*shares)
    store.put(f"{name}.json", chrome_trace(ranks, about))
    store.put(f"{name}.svg", picture(ranks, title))


def find_profiles(store: ObjectStore, folder: str) -> tuple[str, ...]:
    """Return the names of what a run has recorded, traces and pictures, in the order of its steps."""
    return tuple(sorted(info.key for info in store.list(f"{folder}/{FOLDER}")))
