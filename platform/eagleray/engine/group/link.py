"""The leader's side of a group: commands to all ranks, results from some of them, and who is still there."""

from __future__ import annotations

import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

from eagleray.engine.group.commands import Command
from eagleray.engine.group.wire import Close, Compare, Done, Ended, Failed, Ping, Pong, Run, receive, send
from eagleray.errors import RanksLostError

logger = logging.getLogger(__name__)

PING_S = 1.0
CLOSE_TIMEOUT_S = 5.0

OnLost = Callable[[str], None]


class CommandFailedError(RuntimeError):
    """The model raised on every rank alike; the group goes on."""


class Link:
    """The ranks of one model, as long as all of them live.

    One thread reads what they say. A rank that closes its connection is lost at once, one that does not answer
    within `timeout_s` after that; a group with a lost rank is of no more use, and every call says so.

    Args:
        connections: One to each rank, in their order.
        speakers: The stages' ranks, stage by stage; those of the last stage answer commands.
        timeout_s: Seconds in which a rank must say that it lives.
        on_lost: Told why, once, in the reading thread, before anybody who waits is.
    """

    def __init__(
        self,
        connections: Sequence[Connection],
        stages: Sequence[Sequence[int]],
        timeout_s: float,
        on_lost: OnLost = lambda _: None,
    ) -> None:
        self._connections, self._stages = list(connections), stages
        self._timeout_s, self._on_lost = timeout_s, on_lost
        self._rank_of = {connection: rank for rank, connection in enumerate(connections)}
        self._lock = threading.Lock()  # one command at a time, and whole messages
        self._sending = [threading.Lock() for _ in connections]
        self._inbox: queue.SimpleQueue[tuple[int, Any] | None] = queue.SimpleQueue()
        self._number = 0
        self._asked_at: list[float | None] = [None] * len(connections)  # the first question without an answer
        self._lost: str | None = None
        self._closing = False
        self._reader = threading.Thread(target=self._read, name="eagleray-ranks", daemon=True)
        self._reader.start()

    @property
    def lost(self) -> str | None:
        """Why the group is of no more use; None while it lives."""
        return self._lost

    def call(self, command: Command) -> list[Any]:
        """Let all ranks do their share; return what they have to say about the result, in their order.

        Raises:
            RanksLostError: A rank is gone, or they are out of step.
            CommandFailedError: The command raised on every rank alike.
        """
        with self._lock:
            self._number += 1
            self._send_all(Run(self._number, command))
            speakers = set(self._stages[-1])
            found: dict[int, Any] = {}
            while found.keys() != speakers:
                rank, message = self._next()
                if isinstance(message, Failed) and message.number == self._number:
                    self._settle(rank, message)
                if isinstance(message, Done) and message.number == self._number:
                    found[rank] = message.value
        return [found[rank] for rank in sorted(found) if found[rank] is not None]

    def close(self) -> None:
        """Let the ranks end."""
        with self._lock:
            if self._closing:
                return
            self._closing = True
            for rank in range(len(self._connections)):
                with suppress(OSError):
                    self._send(rank, Close())
        self._reader.join(CLOSE_TIMEOUT_S)
        for connection in self._connections:
            _hang_up(connection)  # a rank that did not end by itself
        self._reader.join(CLOSE_TIMEOUT_S)
        for connection in self._connections:
            connection.close()

    def _settle(self, rank: int, failed: Failed) -> None:
        """Find out whether all ranks raised the same, so that they are in step still.

        Raises:
            CommandFailedError: They are.
            RanksLostError: They are not, or one does not answer.
        """
        if not failed.lost_peer:
            self._send_all(Compare(self._number))
            places: dict[int, str | None] = {}
            deadline = time.monotonic() + self._timeout_s
            while len(places) < len(self._connections) and time.monotonic() < deadline:
                sender, message = self._next(deadline)
                if isinstance(message, Ended) and message.number == self._number:
                    places[sender] = message.place
                if isinstance(message, Failed) and message.lost_peer:
                    break
            if len(places) == len(self._connections) and is_in_step(places, self._stages):
                logger.warning("a command raised on all ranks:\n%s", failed.trace.rstrip())
                raise CommandFailedError(f"{failed.kind}: {failed.message}")
        self._lose(f"rank {rank} raised {failed.kind}: {failed.message}")
        raise self._error()

    def _next(self, deadline: float | None = None) -> tuple[int, Any]:
        """Return the next message and its sender.

        Raises:
            RanksLostError: A rank is gone, or nothing came before the deadline.
        """
        if self._lost is not None:
            raise self._error()
        try:
            timeout_s = None if deadline is None else max(0.0, deadline - time.monotonic())
            message = self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            message = None
            self._lose(f"a rank did not say within {self._timeout_s:g} s how its command ended")
        if message is None:
            raise self._error()
        return message

    def _send_all(self, message: Any) -> None:
        if self._lost is not None:
            raise self._error()
        for rank in range(len(self._connections)):
            try:
                self._send(rank, message)
            except OSError:
                self._lose(f"rank {rank} is gone")
                raise self._error() from None

    def _send(self, rank: int, message: Any) -> None:
        with self._sending[rank]:
            send(self._connections[rank], message)

    def _read(self) -> None:
        """Hand on what ranks say, ask them whether they live, and notice when one does not."""
        every_s = min(PING_S, self._timeout_s / 4)
        asked_at = time.monotonic()
        while self._lost is None:
            # What came meanwhile is read before anybody is called late, also where this process stood still.
            for connection in wait(self._connections, timeout=every_s / 4):
                assert isinstance(connection, Connection)
                if not self._take(connection):
                    return
            if time.monotonic() - asked_at >= every_s:
                asked_at = time.monotonic()
                if not self._ask(asked_at):
                    return

    def _take(self, connection: Connection) -> bool:
        rank = self._rank_of[connection]
        try:
            message = receive(connection)
        except (EOFError, OSError):
            self._lose(f"rank {rank} is gone")
            return False
        self._asked_at[rank] = None
        if not isinstance(message, Pong):
            self._inbox.put((rank, message))
        return True

    def _ask(self, now: float) -> bool:
        for rank, sending in enumerate(self._sending):
            if now - (self._asked_at[rank] or now) > self._timeout_s:
                self._lose(f"rank {rank} did not answer within {self._timeout_s:g} s")
                return False
            self._asked_at[rank] = self._asked_at[rank] or now
            if sending.acquire(blocking=False):  # else a command is on its way, and the rank takes it or is late
                try:
                    send(self._connections[rank], Ping())
                except OSError:
                    self._lose(f"rank {rank} is gone")
                    return False
                finally:
                    sending.release()
        return True

    def _lose(self, reason: str) -> None:
        if self._lost is None and not self._closing:
            self._lost = reason
            logger.error("a model's ranks are of no more use: %s", reason)
            self._on_lost(reason)
            for connection in self._connections:
                _hang_up(connection)
        self._lost = self._lost or "the group was closed"
        self._inbox.put(None)

    def _error(self) -> RanksLostError:
        return RanksLostError(
            f"a part of the model is gone: {self._lost}",
            "try again: other replicas answer, and this one is replaced",
        )


def _hang_up(connection: Connection) -> None:
    """End a connection in both directions, so that ranks see it and nobody stays in the middle of sending."""
    with suppress(OSError), socket.socket(fileno=os.dup(connection.fileno())) as both:
        both.shutdown(socket.SHUT_RDWR)


def is_in_step(places: Mapping[int, str | None], stages: Sequence[Sequence[int]]) -> bool:
    """Say whether ranks that did the same ended in the same way, and every stage behind a failed one failed.

    Args:
        places: Where each rank raised; None: it did not.
        stages: The ranks of each stage.
    """
    failed = False
    for stage in stages:
        found = {places[rank] for rank in stage}
        if len(found) > 1 or (failed and None in found):
            return False
        failed = None not in found
    return True
