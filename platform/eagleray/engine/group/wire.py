"""What passes between the process that leads a group and its ranks, and how they find each other."""

from __future__ import annotations

import hashlib
import pickle
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from eagleray.config.layout import Layout
from eagleray.config.schema import ServeConfig
from eagleray.engine.group.commands import Command
from eagleray.store.objects import ObjectStore

_LOST_PEER = ("gloo", "nccl", "connection", "timed out", "broken pipe", "socket")
"""What torch says when another rank is gone, in errors of no class of its own."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Where the ranks of a group meet.

    Attributes:
        address: Where the leader listens, host and port.
        key: What both sides prove to know.
        rendezvous: Port of the store by which ranks find each other, on the same host; None: they have a process
            group already.
    """

    address: tuple[str, int]
    key: bytes
    rendezvous: int | None


@dataclass(frozen=True, slots=True)
class RankSpec:
    """All that one rank needs to know.

    Attributes:
        rank: Its number, the innermost axis is the tensor-parallel one.
        layout: How the model is cut.
        store: The store.
        name: Name of the model.
        version: `r2-step-00001200`.
        serve: Precision and limits.
        device_type: Where it computes.
        meeting: Where it meets the others.
        ends_with_leader: Whether its process ends when the leader is gone.
    """

    rank: int
    layout: Layout
    store: ObjectStore
    name: str
    version: str
    serve: ServeConfig
    device_type: str
    meeting: Meeting
    ends_with_leader: bool = True


@dataclass(frozen=True, slots=True)
class Ready:
    """A rank has loaded its part.

    Attributes:
        rank: Which.
        pid: Its process.
        settings: The generation config that our own decoder follows; None: there is no such decoder.
        generates: Whether transformers decodes.
        num_bytes_read: Of the checkpoint.
    """

    rank: int
    pid: int
    settings: Mapping[str, Any] | None
    generates: bool
    num_bytes_read: int


@dataclass(frozen=True, slots=True)
class Run:
    """Do a rank's share of a command."""

    number: int
    command: Command


@dataclass(frozen=True, slots=True)
class Compare:
    """Say how a command ended: whether the ranks are still in step."""

    number: int


@dataclass(frozen=True, slots=True)
class Ping:
    """Say that the process lives."""


@dataclass(frozen=True, slots=True)
class Close:
    """End."""


@dataclass(frozen=True, slots=True)
class Done:
    """A command's result, as far as this rank has to tell it."""

    number: int
    value: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """A command raised on this rank.

    Attributes:
        number: Of the command.
        kind: Class of the error.
        message: Its text.
        trace: Its traceback, as Python prints it.
        place: Hash of where and what it raised: equal on ranks that did the same.
        lost_peer: Whether it only noticed that another rank is gone.
    """

    number: int
    kind: str
    message: str
    trace: str
    place: str
    lost_peer: bool

    @classmethod
    def of(cls, number: int, error: Exception) -> Failed:
        """Describe an error."""
        frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
        kind, message = type(error).__name__, str(error)
        place = hashlib.sha256(repr((kind, message, frames)).encode()).hexdigest()
        return cls(number, kind, message, "".join(traceback.format_exception(error)), place, _is_lost_peer(error))


@dataclass(frozen=True, slots=True)
class Ended:
    """How a command ended on this rank: the place of its error; None: well."""

    number: int
    place: str | None


@dataclass(frozen=True, slots=True)
class Pong:
    """The process lives."""


def send(connection: Connection, message: Any) -> None:
    """Send a message.

    Not by the connection's own `send`: torch has tensors travel as handles of shared memory there, which only
    processes that were forked from each other can open.
    """
    connection.send_bytes(pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL))


def receive(connection: Connection) -> Any:
    """Return the next message.

    Raises:
        EOFError: The other side is gone; OSError, too.
    """
    return pickle.loads(connection.recv_bytes())


def _is_lost_peer(error: Exception) -> bool:
    names = {each.__name__ for each in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "ConnectionError"}:
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST_PEER)
