"""What Ray Train runs on each worker: everything around the loop that knows Ray."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from eagleray.errors import StoreError, WorkerError
from eagleray.scheduling import come_first, give_way
from eagleray.store.runs import RunHandle, stop_requested
from eagleray.store.saver import SaveResult
from eagleray.store.sharing import check_shared
from eagleray.telemetry import logging_to
from eagleray.user_code import add_code
from eagleray_jobs.train.board import Phase, Saved
from eagleray_jobs.train.failures import RankFailure
from eagleray_jobs.train.memory import MemoryGuard, as_memory_error, over_limit, spare_the_collector
from eagleray_jobs.train.spec import LoopResult, MetricRecord, WorkerSpec

STOP_POLL_S = 0.5
POST_TIMEOUT_S = 60.0


def train_on_worker(payload: dict[str, Any]) -> None:
    """Train on this worker; the payload holds `spec` (WorkerSpec) and `board` (actor handle).

    Raises:
        WorkerError: Whatever went wrong; the board has the error itself, whichever class it is of.
    """
    import ray
    from ray.train import get_context

    come_first()
    board, spec, rank = payload["board"], payload["spec"], get_context().get_world_rank()
    restarts = ray.get(board.start.remote(rank), timeout=POST_TIMEOUT_S)
    limit_bytes = spec.config.resources.worker_memory_limit_bytes
    try:
        with (
            logging_to(run=f"{spec.run.name}@r{spec.run.run}", rank=rank),
            MemoryGuard(limit_bytes, partial(_end_over_limit, board, rank, limit_bytes)) as guard,
        ):
            result = _train(spec, board, rank, restarts, guard)
    except BaseException as error:
        failure = RankFailure.of(rank, as_memory_error(rank, error) or error)
        ray.get(board.fail.remote(failure), timeout=POST_TIMEOUT_S)
        # The class of the error may be the user's own, and unknown to Ray's controller.
        raise WorkerError(f"rank {rank} raised {type(error).__name__}: {error}") from None
    if rank == 0:
        ray.get(board.finish.remote(result), timeout=POST_TIMEOUT_S)


def _train(spec: WorkerSpec, board: Any, rank: int, restarts: int, guard: MemoryGuard) -> LoopResult:
    from ray.train.torch import get_device

    from eagleray_jobs.train.lookout import Lookout, watched
    from eagleray_jobs.train.loop import run_loop
    from eagleray_jobs.train.parts import assemble

    _use_local_code(spec.config.code)
    _set_threads()
    with (
        closing(Lookout(spec.run.attempt)) as lookout,
        watched(lookout),
        WorkerControl(board, spec.run, rank, restarts) as control,
    ):
        lookout.doing("look at the store")
        check_shared(spec.run)
        lookout.doing("load model")
        if rank == 0:
            board.post.remote(Phase("load model", restarts))
        parts = assemble(
            spec,
            get_device(),
            extra_sinks=lambda: [RayMetrics(spec.config.name)],
            lookout=lookout,
            has_room=guard.has_room,
        )
        spare_the_collector()
        return run_loop(spec, parts, control)


def _end_over_limit(board: Any, rank: int, limit_bytes: int, held_bytes: int) -> None:
    """Tell why, and end this process in whatever it is doing: it would only take more."""
    import ray

    try:
        failure = RankFailure.of(rank, over_limit(rank, held_bytes, limit_bytes))
        ray.get(board.fail.remote(failure), timeout=POST_TIMEOUT_S)
    finally:
        os._exit(1)


def _use_local_code(code: Sequence[str]) -> None:
    """Import the user's packages from where they lie; on another node they came with the runtime environment."""
    add_code(entry for entry in code if Path(entry).is_dir())


def _set_threads() -> None:
    """Give torch as many threads as the worker has CPUs, and at least one."""
    import ray
    import torch

    cpus = ray.get_runtime_context().get_assigned_resources().get("CPU", 1.0)
    torch.set_num_threads(max(1, int(cpus)))


class WorkerControl:
    """How the loop talks to the driver; no method waits for anything.

    A thread looks for the stop record, so that a slow store does not slow a step. One rank does: the loop tells
    the others.
    """

    def __init__(self, board: Any, run: RunHandle, rank: int, restarts: int) -> None:
        self._board, self._run, self._rank, self._restarts = board, run, rank, restarts
        self._stop, self._closed = threading.Event(), threading.Event()
        self._num_asked = 0
        self._watch = threading.Thread(target=self._watch_record, name="stop-record", daemon=True)

    def __enter__(self) -> WorkerControl:
        if self._rank == 0:
            self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def stop_requested(self) -> bool:
        """Whether the run should commit and end."""
        self._num_asked += 1
        if self._rank == 0 and self._num_asked <= 2:  # asked before each step: the second time, one is done
            self._board.post.remote(Phase("first step" if self._num_asked == 1 else "train", self._restarts))
        return self._stop.is_set()

    def log(self, record: MetricRecord) -> None:
        """Post a record."""
        self._board.post.remote(record)

    def saved(self, result: SaveResult) -> None:
        """Post how a save ended."""
        if self._rank == 0:
            error = None if result.error is None else str(result.error)
            self._board.post.remote(Saved(result.step, result.ref, error))

    def _watch_record(self) -> None:
        give_way()
        while not self._closed.wait(STOP_POLL_S):
            try:
                if stop_requested(self._run):
                    self._stop.set()
                    return
            except StoreError:
                continue  # asked again; a store that stays away shows in the saves


class RayMetrics:
    """Puts the last record on Ray's own metrics, for Prometheus and the dashboard."""

    GAUGES = ("step", "loss", "learning_rate", "grad_norm", "examples_per_s", "tokens_per_s", "memory_bytes")

    def __init__(self, run: str) -> None:
        from ray.util.metrics import Gauge

        self._tags = {"run": run, "pid": str(os.getpid())}
        self._gauges = {
            name: Gauge(f"eagleray_train_{name}", f"{name} of a training run", tag_keys=tuple(self._tags))
            for name in self.GAUGES
        }

    def write(self, records: Sequence[MetricRecord]) -> None:
        """Show the newest record."""
        for name, gauge in self._gauges.items():
            gauge.set(getattr(records[-1], name), tags=self._tags)

    def close(self) -> None:
        """Nothing is kept back."""
