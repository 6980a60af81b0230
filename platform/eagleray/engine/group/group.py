"""From a committed version to an engine whose weights lie on several ranks."""

from __future__ import annotations

import logging
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, Listener, wait
from typing import Any, Protocol

from torch import nn
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from eagleray.config.layout import Layout
from eagleray.config.schema import ServeConfig
from eagleray.engine.decoder import NetworkGenerator
from eagleray.engine.decoding import GeneratingModel
from eagleray.engine.engine import Engine
from eagleray.engine.group.check import group_layout
from eagleray.engine.group.led import LedGeneratingModel, LedModel, LedNetwork
from eagleray.engine.group.link import Link, OnLost
from eagleray.engine.group.wire import Meeting, RankSpec, Ready, receive
from eagleray.engine.plan import BatchLimits
from eagleray.errors import EaglerayError, ServingError
from eagleray.store.checkpoint import Checkpoint
from eagleray.tasks import load_task

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
JOIN_TIMEOUT_S = 120.0
POLL_S = 0.5


class Ranks(Protocol):
    """The processes of a group."""

    def check(self) -> None:
        """Raise what ended a process that should run."""
        ...

    def end(self) -> None:
        """End those that are left."""
        ...


Launch = Callable[[Sequence[RankSpec]], Ranks]
"""Starts a process for each rank, which calls `run_rank`."""


@dataclass(frozen=True, slots=True)
class GroupPlace:
    """Where a group runs.

    Attributes:
        launch: Starts its ranks.
        device_type: Where they compute.
        host: Address of this process, which they reach.
        on_lost: Told when a rank is lost.
        has_process_group: Whether the ranks are in a process group of their own already.
    """

    launch: Launch
    device_type: str = "cpu"
    host: str = "127.0.0.1"
    on_lost: OnLost = lambda _: None
    has_process_group: bool = False


def load_group(checkpoint: Checkpoint, serve: ServeConfig, place: GroupPlace) -> Engine:
    """Load a version onto several ranks; the engine is used and closed like one of this process.

    Args:
        checkpoint: The opened version.
        serve: Its degrees, precision and limits.
        place: Where the ranks run.

    Raises:
        ConfigError: The layout cannot cut the model.
        CheckpointDamagedError: A byte is not what was committed.
        ServingError: A rank did not start, or failed while it loaded.
    """
    layout, key = group_layout(serve), secrets.token_bytes(32)
    with ExitStack() as opened:
        listener = opened.enter_context(Listener((place.host, 0), backlog=layout.num_workers, authkey=key))
        rendezvous = None if place.has_process_group else _Rendezvous(place.host)
        meeting = Meeting(_address(listener), key, None if rendezvous is None else rendezvous.port)
        ranks = place.launch(_specs(checkpoint, serve, layout, place.device_type, meeting))
        opened.callback(ranks.end)
        connections = _accept(listener, layout.num_workers, ranks)
        for connection in connections:
            opened.callback(connection.close)
        ready = _await_ready(connections, ranks)
        link = Link(connections, stages_of(layout), serve.rank_timeout_s, place.on_lost)
        opened.callback(link.close)
        kept = opened.pop_all()
    logger.info("%s is loaded by processes %s", checkpoint.ref, ", ".join(str(each.pid) for each in ready))
    return _engine(checkpoint, serve, link, ready, partial(_close, kept, rendezvous))


def stages_of(layout: Layout) -> list[list[int]]:
    """Return the ranks of each stage; the mesh's innermost axis is the tensor-parallel one."""
    return [[stage * layout.tensor + shard for shard in range(layout.tensor)] for stage in range(layout.pipeline)]


class _Rendezvous:
    """The store by which ranks find each other, on one address of this machine."""

    def __init__(self, host: str) -> None:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
            listening.bind((host, 0))
            listening.listen()
            self.port: int = listening.getsockname()[1]
            # By itself it would listen on every interface, and it asks nobody who they are.
            self._store = TCPStore(
                host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
            )


def _specs(
    checkpoint: Checkpoint, serve: ServeConfig, layout: Layout, device_type: str, meeting: Meeting
) -> list[RankSpec]:
    return [
        RankSpec(
            rank,
            layout,
            checkpoint.store,
            checkpoint.manifest.name,
            checkpoint.version,
            serve,
            device_type,
            meeting,
            ends_with_leader=meeting.rendezvous is not None,
        )
        for rank in range(layout.num_workers)
    ]


def _address(listener: Listener) -> tuple[str, int]:
    address: Any = listener.address
    return address[0], address[1]


def _accept(listener: Listener, num_ranks: int, ranks: Ranks) -> list[Connection]:
    """Wait for every rank; return the connections in their order."""
    found: dict[int, Connection] = {}
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    accepting: Any = listener
    accepting._listener._socket.settimeout(POLL_S)
    while len(found) < num_ranks:
        try:
            connection = listener.accept()
            found[receive(connection)] = connection
        except TimeoutError:
            ranks.check()
            if time.monotonic() > deadline:
                missing = ", ".join(str(rank) for rank in range(num_ranks) if rank not in found)
                raise ServingError(
                    f"ranks {missing} of {num_ranks} did not start within {JOIN_TIMEOUT_S:g} s",
                    "their resources may be in use: eagleray doctor shows what there is",
                ) from None
        except (AuthenticationError, EOFError, OSError):
            logger.warning("somebody who is no rank of this group came to its door")
    return [found[rank] for rank in range(num_ranks)]


def _await_ready(connections: Sequence[Connection], ranks: Ranks) -> list[Ready]:
    """Wait until every rank has loaded its part.

    Raises:
        EaglerayError: What a rank raised.
        ServingError: A rank is gone, or the time is over.
    """
    found: dict[int, Ready] = {}
    deadline = time.monotonic() + LOAD_TIMEOUT_S
    while len(found) < len(connections):
        for connection in wait(connections, timeout=POLL_S):
            assert isinstance(connection, Connection)
            rank = connections.index(connection)
            try:
                message = receive(connection)
            except (EOFError, OSError):
                raise ServingError(f"rank {rank} of {len(connections)} died while it loaded its part") from None
            if isinstance(message, EaglerayError):
                raise message
            found[rank] = message
        ranks.check()
        if time.monotonic() > deadline:
            raise ServingError(f"the parts of the model were not loaded within {LOAD_TIMEOUT_S:g} s")
    return [found[rank] for rank in range(len(connections))]


def _engine(
    checkpoint: Checkpoint, serve: ServeConfig, link: Link, ready: Sequence[Ready], close: Callable[[], None]
) -> Engine:
    config = checkpoint.config()
    task = load_task(config)
    limits = BatchLimits(serve.max_batch_size, serve.max_batch_tokens)
    model: nn.Module = LedModel(link)
    if ready[-1].settings is not None:
        model = GeneratingModel(model, NetworkGenerator(LedNetwork(link), ready[-1].settings, limits))
    elif ready[-1].generates:
        model = LedGeneratingModel(link)
    processor = task.load_processor(checkpoint.files())
    # The precision is the ranks'; what drives them computes nothing.
    return Engine(model, task, processor, ref=checkpoint.ref, limits=limits, backend="torch", close=close)


def _close(kept: ExitStack, rendezvous: _Rendezvous | None) -> None:
    # The store is named here, so that it lives as long as the ranks.
    kept.close()
    del rendezvous
