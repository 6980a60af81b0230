"""What is remembered of the servers of this machine: one record each under `~/.eagleray/serve/`."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

HOME_VARIABLE = "EAGLERAY_HOME"
LOG_LIFE_S = 7 * 24 * 3600

State = Literal["starting", "ready", "failed", "stopping", "abandoned"]
"""What a server is doing; abandoned: it was killed, and its applications are still on the cluster it joined."""


@dataclass(frozen=True, slots=True)
class ServerRecord:
    """One server.

    Attributes:
        id: Its name in `serve stop`.
        pid: The process that ends it, and with a head of our own all others; None for applications that were left
            on a joined cluster on purpose.
        created: When that process was created, in seconds since the epoch: a pid alone may be somebody else's.
        address: The joined cluster; None for a head of our own.
        folder: The server's own folder, removed at its end; None on a joined cluster.
        url: Where it answers.
        applications: The names of its Serve applications.
        models: The full references that it serves.
        log: Where its output is; None in the foreground.
        state: What it is doing.
        error: Code, message and hint, when it failed.
        certificate: The certificate chain that it shows; None: plain HTTP.
    """

    id: str
    pid: int | None
    created: float | None
    address: str | None
    folder: str | None
    url: str
    applications: tuple[str, ...]
    models: tuple[str, ...]
    log: str | None
    state: State
    error: dict[str, Any] | None = None
    certificate: str | None = None

    @property
    def is_alive(self) -> bool:
        """Whether its process runs, where it has one."""
        return self.pid is None or find_process(self) is not None

    def as_json(self) -> dict[str, Any]:
        """Return what `serve status` shows."""
        return asdict(self)


def own_record(
    id: str,
    folder: Path | None,
    url: str,
    applications: Sequence[str],
    models: Sequence[str],
    log: str | None,
    address: str | None = None,
) -> ServerRecord:
    """Return the record of a server that this process is; the attributes are those of the record."""
    return ServerRecord(
        id=id,
        pid=os.getpid(),
        created=psutil.Process().create_time(),
        address=address,
        folder=None if folder is None else str(folder),
        url=url,
        applications=tuple(applications),
        models=tuple(models),
        log=log,
        state="starting",
    )


def find_process(record: ServerRecord) -> psutil.Process | None:
    """Return the process of a record, if that very process still runs."""
    if record.pid is None:
        return None
    try:
        process = psutil.Process(record.pid)
        same = record.created is not None and abs(process.create_time() - record.created) < 0.1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except psutil.NoSuchProcess:
        return None


class Home:
    """The folder of the records.

    Args:
        root: `~/.eagleray`, or what EAGLERAY_HOME says.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self._dir = root / "serve"

    @classmethod
    def default(cls) -> Home:
        """Return the user's own."""
        return cls(Path(os.environ.get(HOME_VARIABLE) or Path.home() / ".eagleray"))

    def new_id(self) -> str:
        """Return a name that no record has."""
        return secrets.token_hex(4)

    def log_path(self, id: str) -> Path:
        """Return where a detached server writes; the logs of servers that ended a week ago are removed."""
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        for old in self._dir.glob("*.log*"):
            if time.time() - old.stat().st_mtime > LOG_LIFE_S and not old.with_suffix(".json").exists():
                old.unlink(missing_ok=True)
        return self._dir / f"{id}.log"

    def new_token_sha256(self, id: str) -> str:
        """Make the secret with which a server is commanded, which only its user can read; returns its hash."""
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = self._token_path(id)
        path.unlink(missing_ok=True)
        path.touch(mode=0o600)
        token = secrets.token_hex(32)
        path.write_text(token)
        return hashlib.sha256(token.encode()).hexdigest()

    def token(self, id: str) -> str | None:
        """Return the secret of a server; None: it has none."""
        try:
            return self._token_path(id).read_text()
        except OSError:
            return None

    def _token_path(self, id: str) -> Path:
        return self._dir / f"{id}.token"

    def write(self, record: ServerRecord) -> None:
        """Write a record; a reader sees the old one or the new one."""
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        temporary = self._dir / f".{record.id}.{os.getpid()}"
        temporary.write_text(json.dumps(record.as_json(), indent=2))
        temporary.replace(self._dir / f"{record.id}.json")

    def update(self, record: ServerRecord, state: State, error: dict[str, Any] | None = None) -> ServerRecord:
        """Write a record's new state."""
        record = replace(record, state=state, error=error)
        self.write(record)
        return record

    def read(self, id: str) -> ServerRecord | None:
        """Return a record, or None where there is none."""
        return _read(self._dir / f"{id}.json")

    def records(self) -> list[ServerRecord]:
        """Return all records, oldest first; those of which nothing is left are cleared away."""
        paths = sorted(self._dir.glob("*.json"), key=lambda path: path.stat().st_mtime)
        alive = []
        for record in filter(None, map(_read, paths)):
            if record.is_alive:
                alive.append(record)
            elif record.address is not None:
                alive.append(replace(record, state="abandoned"))
            elif record.state != "failed":  # whoever waits for a failed one reads why
                self.remove(record)
        return [record for record in alive if record.state != "failed"]

    def remove(self, record: ServerRecord) -> None:
        """Forget a server and remove its folder; its log stays."""
        (self._dir / f"{record.id}.json").unlink(missing_ok=True)
        self._token_path(record.id).unlink(missing_ok=True)
        if record.folder is not None:
            shutil.rmtree(record.folder, ignore_errors=True)


def _read(path: Path) -> ServerRecord | None:
    try:
        value = json.loads(path.read_text())
        value["applications"], value["models"] = tuple(value["applications"]), tuple(value["models"])
        return ServerRecord(**value)
    except (OSError, ValueError, TypeError, KeyError):
        return None  # removed meanwhile, or written by another version
