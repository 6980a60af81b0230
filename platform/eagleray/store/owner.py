"""Who owns a run, and whether it still lives."""

from __future__ import annotations

import getpass
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from eagleray.errors import NotFoundError
from eagleray.store.objects import ObjectStore
from eagleray.store.records import read_record
from eagleray.store.runs import run_dir


@dataclass(frozen=True, slots=True)
class Timing:
    """How owners and challengers keep time, each on its own clock.

    Attributes:
        beat_s: Between two beats of an owner.
        watch_s: How long a challenger waits for a beat.
        poll_s: Between two looks of a challenger.
    """

    beat_s: float = 5.0
    watch_s: float = 20.0
    poll_s: float = 1.0


DEFAULT_TIMING = Timing()


@dataclass(frozen=True, slots=True)
class Owner:
    """A process that owns a run.

    Attributes:
        host: Name of its machine.
        machine: What tells that machine, since it was started, and its space of process numbers from others.
        pid: Number of the process.
        started: When the process started, in seconds since 1970.
        user: Who runs it.
    """

    host: str
    machine: str
    pid: int
    started: float
    user: str

    @classmethod
    def this_process(cls) -> Owner:
        """The calling process."""
        pid = os.getpid()
        return cls(socket.gethostname(), _machine(), pid, psutil.Process(pid).create_time(), _user())

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> Owner:
        """What `to_record` wrote."""
        return cls(**record)

    def to_record(self) -> dict[str, Any]:
        """For a JSON record."""
        return asdict(self)

    def is_running(self) -> bool | None:
        """Whether the process runs; None: it is on another machine, and cannot be seen from here."""
        if (self.host, self.machine) != (socket.gethostname(), _machine()):
            return None
        try:
            process = psutil.Process(self.pid)
            # A number is given again after a while.
            is_same = abs(process.create_time() - self.started) < 1
            return is_same and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def __str__(self) -> str:
        return f"process {self.pid} of {self.user} on {self.host}"


def beat_key(name: str, run: int) -> str:
    """The key of the record that an owner renews."""
    return f"{run_dir(name, run)}/beat.json"


def is_alive(
    store: ObjectStore,
    name: str,
    run: int,
    epoch: int,
    owner: Owner,
    *,
    timing: Timing,
    notify: Callable[[str], None],
) -> bool:
    """Whether the owner of an epoch lives: at once where its process can be seen, else by its beats."""
    is_running = owner.is_running()
    if is_running is not None:
        return is_running
    notify(f"Run r{run} of {name} belongs to {owner}; watching for {timing.watch_s:.0f} s whether it lives.")
    first = _beat(store, name, run, epoch)
    deadline = time.monotonic() + timing.watch_s
    while time.monotonic() < deadline:
        time.sleep(timing.poll_s)
        if _beat(store, name, run, epoch) != first:
            return True
    return False


def _beat(store: ObjectStore, name: str, run: int, epoch: int) -> str | None:
    """What is different in each beat of this epoch; beats of an owner that was taken over do not count."""
    try:
        record = read_record(store, beat_key(name, run))
    except NotFoundError:
        return None
    return str(record.get("nonce")) if record.get("epoch") == epoch else None


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{psutil.boot_time():.0f}"


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return f"user {os.getuid()}"
