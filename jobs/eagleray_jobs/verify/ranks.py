"""Long-lived groups of local processes that run functions as the ranks of one process group."""

from __future__ import annotations

import logging
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, Self

from eagleray.errors import EaglerayError, WorkerError
from eagleray_jobs.train.failures import RankFailure, find_fatal, merge, spell_ranks

START_TIMEOUT_S = 180.0
GRACE_S = 5.0
"""Time for the other ranks to raise the same after one has raised: those that wait for it would wait in vain."""
END_TIMEOUT_S = 10.0

PRELOADED = ["torch.distributed.fsdp", "transformers.modeling_utils", "eagleray_jobs.verify.rank"]
"""Imported once by the server that ranks are forked from: each rank would spend a second of CPU on them."""

DeviceType = Literal["cpu", "cuda"]


class RanksFailed(Exception):
    """At least one rank raised, died or did not answer in time.

    Attributes:
        failures: What ranks raised; those that only waited for others are named as such.
        dead: How the processes ended that gave no answer, by rank.
    """

    def __init__(self, failures: tuple[RankFailure, ...], dead: Mapping[int, str]) -> None:
        super().__init__(failures, dead)
        self.failures = failures
        self.dead = dead

    def __str__(self) -> str:
        parts = [f"--- rank {each.world_rank} ---\n{each.traceback}" for each in self.failures]
        return "\n".join(parts + [f"--- rank {rank} ---\n{how}" for rank, how in sorted(self.dead.items())])

    def as_error(self) -> EaglerayError:
        """Return one error for all of them: a rank's own where all ranks raised the same."""
        ended: dict[str, list[int]] = {}
        for rank, how in sorted(self.dead.items()):
            ended.setdefault(how, []).append(rank)
        hows = "; ".join(f"{spell_ranks(ranks)}: {how}" for how, ranks in ended.items())
        if hows and not find_fatal(self.failures):
            return WorkerError(
                hows, "A process that is killed may have had too little memory; a slow machine, time."
            )
        return merge(self.failures, self.dead, hows or None)


class RankGroup:
    """`world_size` processes in one process group, each with one thread, started at the first call.

    A group in which a rank failed is out of step: it is ended, and the next call starts a new one. Processes are
    forked from a server that has imported torch once, so that many of them start in little more time than one.

    Args:
        world_size: Processes.
        collective_timeout_s: Seconds after which a collective of the group fails.
        device_type: `cuda` gives each rank a GPU of its own, and NCCL beside gloo.
    """

    def __init__(
        self, world_size: int, collective_timeout_s: float = 30.0, device_type: DeviceType = "cpu"
    ) -> None:
        self.world_size = world_size
        self.collective_timeout_s = collective_timeout_s
        self.device_type = device_type
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._rendezvous: tempfile.TemporaryDirectory[str] | None = None

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 120.0) -> list[Any]:
        """Call `function(*args)` on every rank and return the ranks' results.

        The function is sent by its import path: it must stand at the top of a module, and its arguments and
        result must pickle. `torch.distributed` is initialised on all ranks.

        Raises:
            RanksFailed: With what every rank said that failed.
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
            process.join(END_TIMEOUT_S)
        for connection in self._connections:
            connection.close()
        self._processes, self._connections = [], []
        if self._rendezvous is not None:
            self._rendezvous.cleanup()
            self._rendezvous = None

    def _start(self) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        self._rendezvous = tempfile.TemporaryDirectory(prefix="eagleray-ranks-")
        path = Path(self._rendezvous.name) / "rendezvous"
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (theirs, rank, self.world_size, str(path), self.collective_timeout_s, self.device_type)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)
        self._collect(START_TIMEOUT_S)

    def _collect(self, timeout_s: float) -> list[Any]:
        """Wait for every rank's answer; after the first failure, only a moment for the others to fail as well."""
        outcomes: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_s
        while pending := [rank for rank in range(self.world_size) if rank not in outcomes]:
            waiting = {self._connections[rank]: rank for rank in pending}
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            failed_before = any(map(_is_failure, outcomes.values()))
            for connection in ready:
                assert isinstance(connection, Connection)
                outcomes[waiting[connection]] = self._receive(connection, waiting[connection])
            if not ready:
                outcomes |= {rank: _silent(rank, timeout_s, failed_before) for rank in pending}
            elif not failed_before and any(map(_is_failure, outcomes.values())):
                deadline = min(deadline, time.monotonic() + GRACE_S)
        if any(map(_is_failure, outcomes.values())):
            self.close()
            raise RanksFailed(
                tuple(outcomes[rank] for rank in sorted(outcomes) if isinstance(outcomes[rank], RankFailure)),
                {rank: outcome.how for rank, outcome in outcomes.items() if isinstance(outcome, _Death)},
            )
        return [outcomes[rank] for rank in range(self.world_size)]

    def _receive(self, connection: Connection, rank: int) -> Any:
        try:
            return pickle.loads(connection.recv_bytes())
        except EOFError:
            self._processes[rank].join(END_TIMEOUT_S)
            return _Death(f"the process ended with exit status {self._processes[rank].exitcode}")


@dataclass(frozen=True, slots=True)
class _Death:
    """A rank that gave no answer.

    Attributes:
        how: How its process ended, or that it did not.
    """

    how: str


def _is_failure(outcome: Any) -> bool:
    return isinstance(outcome, RankFailure | _Death)


def _silent(rank: int, timeout_s: float, failed_before: bool) -> RankFailure | _Death:
    """Describe a rank without an answer: it waits for one that failed, or nobody knows for what."""
    if failed_before:
        return RankFailure(rank, "Waiting", "", "waited for the others", lost_peer=True)
    return _Death(f"no answer within {timeout_s:.0f} s")


class RankGroups:
    """One group per world size, started when it is first asked for; a context manager that ends them.

    Args:
        collective_timeout_s: Seconds after which a collective of a group fails.
        device_type: Where the ranks compute.
    """

    def __init__(self, collective_timeout_s: float = 30.0, device_type: DeviceType = "cpu") -> None:
        self._collective_timeout_s = collective_timeout_s
        self._device_type: DeviceType = device_type
        self._groups: dict[int, RankGroup] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for world_size in list(self._groups):
            self.close(world_size)

    def __call__(self, world_size: int) -> RankGroup:
        """Return the group of a world size."""
        if world_size not in self._groups:
            self._groups[world_size] = RankGroup(world_size, self._collective_timeout_s, self._device_type)
        return self._groups[world_size]

    def close(self, world_size: int) -> None:
        """End the processes of a world size, if there are any."""
        if world_size in self._groups:
            self._groups.pop(world_size).close()


def _serve(
    connection: Connection, rank: int, world_size: int, rendezvous: str, timeout_s: float, device_type: DeviceType
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends the group
    os.dup2(2, 1)  # standard output carries the verb's result alone
    join = partial(_join, rank, world_size, rendezvous, timeout_s, device_type)
    connection.send_bytes(_answer(rank, join))
    while True:
        try:
            request = connection.recv_bytes()
        except EOFError:
            return
        connection.send_bytes(_answer(rank, partial(_call, request)))


def _join(rank: int, world_size: int, rendezvous: str, timeout_s: float, device_type: DeviceType) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    # Each rank would say that gathering whole tensors to compare them is slow.
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
    if device_type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "gloo" if device_type == "cpu" else "cpu:gloo,cuda:nccl",
        init_method=f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=timeout_s),
    )


def _call(request: bytes) -> Any:
    path, call = pickle.loads(request)
    sys.path[:] = path
    function, args = pickle.loads(call)
    return function(*args)


def _answer(rank: int, run: Callable[[], Any]) -> bytes:
    try:
        return pickle.dumps(run())
    except BaseException as error:
        return pickle.dumps(RankFailure.of(rank, error))
