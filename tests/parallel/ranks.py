"""Long-lived groups of gloo processes that run module-level functions."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

START_TIMEOUT_S = 120.0


class RanksFailed(AssertionError):
    """At least one rank raised, died or did not answer in time.

    Attributes:
        tracebacks: What each rank that failed said, by rank.
    """

    def __init__(self, tracebacks: dict[int, str]) -> None:
        super().__init__(tracebacks)
        self.tracebacks = tracebacks

    def __str__(self) -> str:
        return "\n".join(f"--- rank {rank} ---\n{text}" for rank, text in sorted(self.tracebacks.items()))


class RankGroup:
    """`world_size` processes in one gloo process group, each with one thread, started at the first call.

    A group in which a rank failed is out of step: it is ended, and the next call starts a new one.
    """

    def __init__(self, world_size: int, collective_timeout_s: float = 30.0) -> None:
        self.world_size = world_size
        self.collective_timeout_s = collective_timeout_s
        self._processes: list[SpawnProcess] = []
        self._connections: list[Connection] = []
        self._rendezvous: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call `function(*args)` on every rank and return the ranks' results.

        The function is sent by its import path: it must stand at the top of a module, and its arguments and
        result must pickle. `torch.distributed` is initialised on all ranks.

        Raises:
            RanksFailed: With the traceback of every rank that failed.
        """
        if not self._processes:
            self._start()
        request = pickle.dumps((sys.path, pickle.dumps((function, args))))
        for connection in self._connections:
            connection.send_bytes(request)
        return self._collect(timeout_s)

    def close(self) -> None:
        """End the processes."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join(10)
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._rendezvous is not None:
            self._rendezvous.cleanup()
            self._rendezvous = None

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._rendezvous = tempfile.TemporaryDirectory(prefix="ranks-")
        path = Path(self._rendezvous.name) / "rendezvous"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.world_size, str(path), self.collective_timeout_s)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(START_TIMEOUT_S)

    def _collect(self, timeout_s: float) -> list[Any]:
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout_s
        while len(answers) < self.world_size:
            pending = {self._connections[rank]: rank for rank in range(self.world_size) if rank not in answers}
            ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                answers |= {rank: (False, f"no answer within {timeout_s} s") for rank in pending.values()}
            for connection in ready:
                assert isinstance(connection, Connection)
                answers[pending[connection]] = self._receive(connection, pending[connection])
        failures = {rank: str(answer) for rank, (succeeded, answer) in answers.items() if not succeeded}
        if failures:
            self.close()
            raise RanksFailed(failures)
        return [answers[rank][1] for rank in range(self.world_size)]

    def _receive(self, connection: Connection, rank: int) -> tuple[bool, Any]:
        try:
            succeeded, answer = pickle.loads(connection.recv_bytes())
            return succeeded, answer
        except EOFError:
            self._processes[rank].join(10)
            return False, f"the process ended with exit status {self._processes[rank].exitcode}"


def _serve(connection: Connection, rank: int, world_size: int, rendezvous: str, timeout_s: float) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )
    connection.send_bytes(pickle.dumps((True, None)))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(request))


def _answer(request: bytes) -> bytes:
    try:
        path, call = pickle.loads(request)
        sys.path[:] = path
        function, args = pickle.loads(call)
        return pickle.dumps((True, function(*args)))
    except BaseException:
        return pickle.dumps((False, traceback.format_exc()))
