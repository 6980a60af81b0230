"""The access log: one JSON line per request, without texts and without addresses unless asked.

The event loop only appends to a queue; a thread writes. Several replicas write to one file: each write is whole
lines, at its end.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import threading
import time
from collections import deque
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from eagleray_serving.visits import Visit

logger = logging.getLogger(__name__)

MAX_WAITING_LINES = 100_000
MAX_FILE_BYTES = 64 * 2**20


class _Answered(NamedTuple):
    time: float
    visit: Visit
    method: str
    route: str
    status: int
    ms: float
    address: str | None


class AccessLog:
    """The lines of one process.

    Args:
        path: The file; it and one of before it, `<path>.1`, hold at most 128 MiB. None: no log.
        has_addresses: Say where a request came from.
        max_file_bytes: Size at which the file becomes the one of before.
    """

    def __init__(
        self, path: Path | None = None, *, has_addresses: bool = False, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        self._path = path
        self._has_addresses = has_addresses
        self._max_file_bytes = max_file_bytes
        self._lines: deque[_Answered] = deque()
        self._num_lost = 0
        self._lock = threading.Lock()

    def add(self, visit: Visit, method: str, route: str, status: int, address: str | None) -> None:
        """Take note of a request that was answered."""
        if self._path is None:
            return
        if len(self._lines) >= MAX_WAITING_LINES:
            self._num_lost += 1  # a disk that does not take them must not fill the memory
            return
        ms = (time.monotonic() - visit.began) * 1000
        self._lines.append(_Answered(time.time(), visit, method, route, status, ms, address))

    def flush(self) -> None:
        """Write what waits; called by a thread, and at the end."""
        with self._lock:
            # One by one: the event loop may add to it meanwhile.
            lines = [self._lines.popleft() for _ in range(len(self._lines))]
            if not lines or self._path is None:
                return
            if self._num_lost:
                logger.error("%d lines of the access log were lost: %s is too slow", self._num_lost, self._path)
                self._num_lost = 0
            try:
                self._write(b"".join(map(self._encoded, lines)))
            except OSError as error:
                logger.error("%d lines of the access log were lost: %s", len(lines), error)

    def _write(self, data: bytes) -> None:
        assert self._path is not None
        # Opened anew each time: somebody may have moved the file away.
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, data)
            if os.fstat(descriptor).st_size > self._max_file_bytes:
                # Another process may have seen the same: only who still finds this very file moves it.
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
                    self._path.replace(f"{self._path}.1")
        finally:
            os.close(descriptor)

    def _encoded(self, answered: _Answered) -> bytes:
        visit, used = answered.visit, answered.visit.used
        when = datetime.fromtimestamp(answered.time, UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {
            "time": when.replace("+00:00", "Z"),
            "id": visit.id,
            "method": answered.method,
            "route": answered.route,
            "model": ",".join({each.model: None for each in used}) or None,
            "version": ",".join({each.version: None for each in used}) or None,
            "status": answered.status,
            "items": sum(each.num_items for each in used),
            "tokens": sum(each.num_tokens for each in used),
            "ms": round(answered.ms, 3),
            "key": None if visit.key is None else visit.key.name,
        }
        if self._has_addresses:
            line["address"] = answered.address
        return json.dumps(line).encode() + b"\n"
