"""When what began and ended on a rank: the seam that steps, passes and pipelines are recorded through."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Protocol

import torch

Kind = Literal[
    "step", "data", "pipeline", "forward", "backward", "weights", "exchange", "clip", "optimizer", "evaluate",
    "save", "collective",
]  # fmt: skip
"""What a rank does: `weights` is the second half of a backward pass that a zero-bubble schedule has split,
`exchange` the wait for the other ranks' loss and count, `clip` the norm of the whole gradient and its clipping."""

_NOTHING = nullcontext()


@dataclass(frozen=True, slots=True)
class Span:
    """One stretch of time of a rank.

    Attributes:
        kind: What it did.
        step: The optimizer step.
        start_ns: Begin, in nanoseconds of the host's monotonic clock.
        end_ns: End, likewise.
        micro_batch: Number of the micro-batch in its step.
        stage: Number of the pipeline's stage.
        name: What a collective is called, with its backend.
        lane: Which thread of the process a collective ran in; 0 is the one that trains.
    """

    kind: Kind
    step: int
    start_ns: int
    end_ns: int
    micro_batch: int | None = None
    stage: int | None = None
    name: str | None = None
    lane: int = 0


class Clock(Protocol):
    """Marks moments of a device."""

    def mark(self) -> Any:
        """Mark now."""
        ...

    def nanoseconds(self, mark: Any) -> int:
        """Return a mark in nanoseconds of the host's monotonic clock."""
        ...


class HostClock:
    """For a CPU, which computes when it is told to."""

    def mark(self) -> int:
        """Return now."""
        return time.monotonic_ns()

    def nanoseconds(self, mark: int) -> int:
        """Return the mark."""
        return mark


class CudaClock:
    """For a GPU, which computes later than it is told to: marks are events of the stream."""

    def __init__(self) -> None:
        torch.cuda.synchronize()
        self._start_ns, self._start = time.monotonic_ns(), self.mark()

    def mark(self) -> torch.cuda.Event:
        """Record an event."""
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def nanoseconds(self, mark: torch.cuda.Event) -> int:
        """Wait for the event and return when it was."""
        mark.synchronize()
        return self._start_ns + round(float(self._start.elapsed_time(mark)) * 1e6)


class Timeline:
    """Records spans while it is on; while it is off a span is one look at an attribute.

    Attributes:
        is_on: Whether spans are recorded.
    """

    def __init__(self) -> None:
        self.is_on = False
        self._step = 0
        self._clock: Clock = HostClock()
        self._marks: list[tuple[Kind, int, Any, Any, int | None, int | None]] = []

    def start(self, step: int, clock: Callable[[], Clock] = HostClock) -> None:
        """Record from here on, as this step."""
        if not self._marks:
            self._clock = clock()
        self.is_on, self._step = True, step

    def stop(self) -> None:
        """Record no more."""
        self.is_on = False

    def span(
        self, kind: Kind, *, micro_batch: int | None = None, stage: int | None = None
    ) -> AbstractContextManager[None]:
        """Record what happens inside of the context."""
        return _Open(self, kind, micro_batch, stage) if self.is_on else _NOTHING

    def take(self) -> list[Span]:
        """Return the spans so far and forget them; waits for the device."""
        marks, self._marks = self._marks, []
        at = self._clock.nanoseconds
        return [
            Span(kind, step, at(start), at(end), micro_batch, stage)
            for kind, step, start, end, micro_batch, stage in marks
        ]

    def _mark(self) -> Any:
        return self._clock.mark()

    def _close(self, kind: Kind, start: Any, micro_batch: int | None, stage: int | None) -> None:
        self._marks.append((kind, self._step, start, self._clock.mark(), micro_batch, stage))


class _Open(AbstractContextManager[None]):
    def __init__(self, timeline: Timeline, kind: Kind, micro_batch: int | None, stage: int | None) -> None:
        self._timeline, self._about = timeline, (micro_batch, stage)
        self._kind: Kind = kind

    def __enter__(self) -> None:
        self._start = self._timeline._mark()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timeline._close(self._kind, self._start, *self._about)
