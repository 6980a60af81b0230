"""One rank's process: it loads its part, and does its share of every command until it is told to end."""

from __future__ import annotations

import logging
import os
import queue
import threading
from datetime import timedelta
from multiprocessing.connection import Client, Connection
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from eagleray.engine.group.load import load_part
from eagleray.engine.group.part import Part
from eagleray.engine.group.wire import (
    Close,
    Compare,
    Done,
    Ended,
    Failed,
    Ping,
    Pong,
    RankSpec,
    Ready,
    Run,
    receive,
    send,
)
from eagleray.errors import EaglerayError, ServingError
from eagleray.store.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

LOAD_TIMEOUT_S = 600.0
LOOPBACK = "127."


def run_rank(spec: RankSpec) -> None:
    """Be a rank of a group until its leader closes it or goes away."""
    connection = Client(spec.meeting.address, authkey=spec.meeting.key)
    assert isinstance(connection, Connection)
    rank = _Rank(connection, spec)
    try:
        rank.load()
    except EaglerayError as error:
        send(connection, error)
    except Exception as error:
        logger.exception("rank %d cannot load its part", spec.rank)
        send(connection, ServingError(f"rank {spec.rank} cannot load its part: {type(error).__name__}: {error}"))
    else:
        rank.serve()
        connection.close()


class _Rank:
    """A rank and the thread that listens for it, so that it says that it lives while it computes."""

    def __init__(self, connection: Connection, spec: RankSpec) -> None:
        self._connection, self._spec = connection, spec
        self._sending = threading.Lock()
        self._inbox: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._part: Part | None = None
        self._ended: tuple[int, str | None] = (0, None)
        send(connection, spec.rank)
        threading.Thread(target=self._listen, name="eagleray-rank", daemon=True).start()

    def load(self) -> None:
        """Join the others and load this rank's part."""
        spec = self._spec
        if spec.meeting.rendezvous is not None:
            _join(spec, spec.meeting.rendezvous)
        checkpoint = Checkpoint.open(spec.store, spec.name, spec.version)
        device = torch.device(spec.device_type)
        part = self._part = load_part(checkpoint, spec.layout, spec.serve, device)
        generates = part.network is None and hasattr(part.module, "generate")
        self._send(Ready(spec.rank, os.getpid(), part.settings, generates, part.num_bytes_read))

    def serve(self) -> None:
        """Do one command after the other."""
        assert self._part is not None
        while True:
            message = self._inbox.get()
            if isinstance(message, Compare):
                number, place = self._ended
                self._send(Ended(message.number, place if number == message.number else None))
            elif isinstance(message, Run):
                self._run(message, self._part)
            else:
                return

    def _run(self, message: Run, part: Part) -> None:
        try:
            with torch.inference_mode():
                value = message.command.run(part)
        except Exception as error:
            failed = Failed.of(message.number, error)
            self._ended = (message.number, failed.place)
            self._send(failed)
            return
        self._ended = (message.number, None)
        if part.pipe.is_last:
            self._send(Done(message.number, value))

    def _send(self, message: Any) -> None:
        with self._sending:
            send(self._connection, message)

    def _listen(self) -> None:
        while True:
            try:
                message = receive(self._connection)
            except (EOFError, OSError):
                if self._spec.ends_with_leader:
                    os._exit(0)  # whatever it computes, nobody waits for it
                message = Close()
            if isinstance(message, Ping):
                self._send(Pong())
                continue
            self._inbox.put(message)
            if isinstance(message, Close):
                return


def _join(spec: RankSpec, rendezvous: int) -> None:
    host, _ = spec.meeting.address
    if host.startswith(LOOPBACK):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # else gloo asks the network which address is its own
    world_size, timeout = spec.layout.num_workers, timedelta(seconds=LOAD_TIMEOUT_S)
    store = TCPStore(host, rendezvous, is_master=False, timeout=timeout)
    backend = "gloo" if spec.device_type == "cpu" else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, store=store, rank=spec.rank, world_size=world_size, timeout=timeout)
