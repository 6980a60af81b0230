"""Stores that fail where a test wants them to."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from eagleray.errors import StoreError
from eagleray.store.objects import Data, ObjectStore
from eagleray.store.uri import parse_store_uri


class FaultyStore(ObjectStore):
    """Calls `before(operation, key)` before each operation of a save; what that raises is the fault."""

    def __init__(self, location: str, before: Callable[[str, str], None]) -> None:
        super().__init__(parse_store_uri(location))
        self.before = before

    def put(self, key: str, data: Data, *, create: bool = False) -> None:
        self.before("put", key)
        super().put(key, data, create=create)
        self.before("after put", key)

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.before("get_range", key)
        return super().get_range(key, start, end)

    def size(self, key: str) -> int:
        self.before("size", key)
        return super().size(key)

    def list(self, prefix: str = "") -> Iterator[Any]:
        self.before("list", prefix)
        return super().list(prefix)


class FullStore(ObjectStore):
    """A disk that is full after `num_bytes`."""

    def __init__(self, location: str, num_bytes: int) -> None:
        super().__init__(parse_store_uri(location))
        self.num_bytes = num_bytes

    def put(self, key: str, data: Data, *, create: bool = False) -> None:
        super().put(key, self._until_full([data] if isinstance(data, bytes) else data), create=create)

    def _until_full(self, pieces: Iterable[bytes | memoryview]) -> Iterator[bytes | memoryview]:
        for piece in pieces:
            self.num_bytes -= len(piece)
            if self.num_bytes < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            yield piece


class Countdown:
    """Refuses the operation number `fail_at` of a save, and all later ones."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.fail_at = fail_at
        self.num_operations = 0

    def __call__(self, operation: str, key: str) -> None:
        if (operation, key.split("/")[0]) == ("size", "runs"):
            # The test looks whether its run exists: that is no part of the save.
            return
        self.num_operations += 1
        if self.fail_at is not None and self.num_operations > self.fail_at:
            raise StoreError(f"refused: {operation} {key}")


class Gate:
    """Holds every put back until it is opened."""

    def __init__(self) -> None:
        self.is_open = threading.Event()
        self.is_reached = threading.Event()

    def __call__(self, operation: str, key: str) -> None:
        if operation == "put" and "/r1-step-" in key:
            self.is_reached.set()
            assert self.is_open.wait(30)
