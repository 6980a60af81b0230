"""Some steps of a run, recorded on all ranks: which ones, and what becomes of what was recorded."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.device_mesh import DeviceMesh

from eagleray.parallel.timeline import Clock, CudaClock, HostClock, Span, Timeline
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.trace import RankTimeline

NUM_STEPS = 3
NUM_WARM_UP_STEPS = 5
"""First steps of a process are slow: memory is allocated, kernels are chosen, buckets are laid out."""

_COLLECTIVES = ("gloo:", "ncclDevKernel", "ncclKernel")

Write = Callable[[Sequence[RankTimeline], range], None]
"""Takes the timelines of all ranks and the steps; called on rank 0."""


def profiled_steps(given: Sequence[int] | None, start: int, max_steps: int) -> range:
    """Return the steps that are recorded.

    Args:
        given: First and last step, as the file says; None: three, after some that warm up.
        start: The step that the run goes on from.
        max_steps: Steps of the run.
    """
    if given is not None:
        return range(max(given[0], start + 1), min(given[1], max_steps) + 1)
    first = max(start + 1, min(start + NUM_WARM_UP_STEPS + 1, max_steps - NUM_STEPS + 1))
    return range(first, min(first + NUM_STEPS, max_steps + 1))


class Profile:
    """Records the steps of a window; made, told of every step and finished by all ranks together.

    Args:
        exchange: Brings the timelines to rank 0.
        mesh: Tells where this rank stands.
        device: Whose time it is.
        write: What becomes of them.
        collectives: Whether collectives are recorded, too, by torch's profiler, which makes the steps slower.
    """

    def __init__(
        self,
        exchange: Exchange,
        mesh: DeviceMesh,
        device: torch.device,
        write: Write,
        *,
        collectives: bool = True,
    ) -> None:
        self.timeline = Timeline()
        self._steps, self._exchange, self._write = range(0), exchange, write
        self._place = _place(mesh)
        self._clock: Callable[[], Clock] = CudaClock if device.type == "cuda" else HostClock
        self._device, self._collectives = device, collectives
        self._profiler: torch.profiler.profile | None = None
        self._open: AbstractContextManager[None] | None = None
        self._done: list[int] = []

    def choose(self, steps: range) -> None:
        """Record these steps; without them nothing is."""
        self._steps = steps

    def begin(self, step: int) -> None:
        """A step begins."""
        if step not in self._steps:
            return
        if self._collectives and not self._done:
            self._profiler = _profiler(self._device)
            self._profiler.start()
        self.timeline.start(step, self._clock)
        self._open = self.timeline.span("step")
        self._open.__enter__()

    def end(self, step: int) -> None:
        """The step has ended; after the last one of the window all timelines are written."""
        if self._open is None:
            return
        self._open.__exit__(None, None, None)
        self._open = None
        self.timeline.stop()
        self._done.append(step)
        if step == self._steps[-1]:
            self.finish()

    def finish(self) -> None:
        """Write what was recorded: of a run that ends inside of the window, the steps so far."""
        done, self._done = self._done, []
        if not done:
            return
        spans = self.timeline.take()
        if self._profiler is not None:
            self._profiler.stop()
            spans += _collectives(self._profiler, spans)
        shift = self._shift_ns()
        moved = [replace(span, start_ns=span.start_ns + shift, end_ns=span.end_ns + shift) for span in spans]
        ranks = self._exchange.collect(RankTimeline(self._exchange.rank, self._place, moved))
        if ranks is not None:
            self._write(ranks, range(done[0], done[-1] + 1))

    def _shift_ns(self) -> int:
        """Return what brings this host's clock to that of rank 0; nothing on the same host."""
        self._exchange.sum([0.0])  # all leave it at about the same time
        moments = self._exchange.gather((_boot_id(), time.monotonic_ns()))
        (first_host, first), (host, own) = moments[0], moments[self._exchange.rank]
        return 0 if host == first_host else first - own


def _profiler(device: torch.device) -> torch.profiler.profile:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    return torch.profiler.profile(activities=activities)


def _collectives(profiler: torch.profiler.profile, spans: Sequence[Span]) -> list[Span]:
    """Return the collectives that torch's profiler saw in the steps, in as few lanes as keep them apart."""
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    offset_ns = time.time_ns() - time.monotonic_ns()  # the profiler counts from 1970
    steps = sorted((span.start_ns, span.end_ns, span.step) for span in spans if span.kind == "step")
    lane_ends: list[int] = []  # gloo has many threads, of which one or two are at work
    found = []
    for event in sorted(profiler.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
        name = event.name()
        if not name.startswith(_COLLECTIVES):
            continue
        start_ns = event.start_ns() - offset_ns
        number = bisect_right(steps, (start_ns, 2**63, 0)) - 1
        if number < 0 or start_ns > steps[number][1]:
            continue
        end_ns = start_ns + event.duration_ns()
        lane = next((lane for lane, free_at in enumerate(lane_ends) if free_at <= start_ns), len(lane_ends))
        lane_ends[lane : lane + 1] = [end_ns]
        found.append(Span("collective", steps[number][2], start_ns, end_ns, name=name, lane=lane + 1))
    return found


def _place(mesh: DeviceMesh) -> str:
    names = {"pp": "pp", "dp_replicate": "dp", "dp_shard": "shard", "tp": "tp"}
    coordinate: Sequence[int] = mesh.get_coordinate() or ()
    axes = zip(mesh.mesh_dim_names or (), coordinate, mesh.mesh.shape, strict=False)
    return ", ".join(f"{names[axis]} {number}" for axis, number, size in axes if size > 1)


def _boot_id() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text().strip() if path.exists() else str(time.time_ns())
