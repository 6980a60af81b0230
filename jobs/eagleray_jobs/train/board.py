"""The board: one small actor on the driver's node that workers post to and the driver reads.

Ray Train's own `report` takes one report per poll of its controller and blocks meanwhile. A post is a call that
nobody waits for, so that telling the driver never slows a step.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eagleray_jobs.train.failures import RankFailure
from eagleray_jobs.train.spec import LoopResult, MetricRecord


@dataclass(frozen=True, slots=True)
class Phase:
    """The workers reached a phase: `start workers`, `first step`, ...

    Attributes:
        name: The phase that begins now.
        restarts: How often the workers were restarted before.
        step: The step that the workers go on from, where it is known.
    """

    name: str
    restarts: int = 0
    step: int = 0


@dataclass(frozen=True, slots=True)
class Saved:
    """A save ended: committed under `ref`, or failed with `error`."""

    step: int
    ref: str | None
    error: str | None = None


Event = Phase | Saved | MetricRecord
"""What a worker posts while the run goes on."""


@dataclass(frozen=True, slots=True)
class Posted:
    """An event and when the board got it, in seconds of the board's clock."""

    event: Event
    at_s: float


class BoardState:
    """What was posted, in order; the actor is this class, and tests use it as it is."""

    def __init__(self) -> None:
        self._events: list[Posted] = []
        self._failures: dict[int, RankFailure] = {}
        self._result: LoopResult | None = None
        self._starts = 0

    def post(self, event: Event) -> None:
        """Add an event."""
        self._events.append(Posted(event, time.monotonic()))

    def start(self, world_rank: int) -> int:
        """Begin an attempt on a rank: failures of an earlier one are forgotten. Returns the restarts so far."""
        if world_rank == 0:
            self._starts += 1
        self._failures.pop(world_rank, None)
        return max(0, self._starts - 1)

    def fail(self, failure: RankFailure) -> None:
        """Record what a rank raised."""
        self._failures[failure.world_rank] = failure

    def finish(self, result: LoopResult) -> None:
        """Record how the loop ended."""
        self._result = result

    def read(self, after: int) -> Sequence[Posted]:
        """Return the events from number `after` on."""
        return self._events[after:]

    def failures(self) -> list[RankFailure]:
        """Return what ranks raised in the present attempt."""
        return list(self._failures.values())

    def result(self) -> LoopResult | None:
        """Return how the loop ended, if it did."""
        return self._result


def open_board(node_id: str) -> Any:
    """Start the actor on a node and return its handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(BoardState).options(num_cpus=0, scheduling_strategy=here).remote()
