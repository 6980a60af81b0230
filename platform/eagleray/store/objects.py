"""One meaning for a directory and for an object store."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, Self

import obstore
from obstore.exceptions import AlreadyExistsError as ObstoreAlreadyExistsError
from obstore.exceptions import BaseError as ObstoreError
from obstore.store import GCSStore, LocalStore, S3Store

from eagleray.errors import AlreadyExistsError, NotFoundError, StoreError
from eagleray.store.credentials import aws_options, redact
from eagleray.store.uri import StoreLocation, parse_store_uri, validate_key

Data = bytes | Iterable[bytes | memoryview]

_SINGLE_PUT_BYTES = 5 * 1024 * 1024
_CONNECT_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ObjectInfo:
    """An object as a listing shows it.

    Attributes:
        key: Its key.
        size: Its bytes.
        modified: When it was written, by the store's clock.
    """

    key: str
    size: int
    modified: datetime


class ObjectStore:
    """Objects under keys. An object appears whole and durable, or not at all.

    Keys are segments of safe characters joined by `/`. A store can be pickled: it opens itself again, with the
    other process's credentials. Every method raises `StoreError` where the store refuses or does not answer.

    Attributes:
        location: The location in its canonical form, without credentials.
        is_local: Whether it is a directory.
    """

    def __init__(self, where: StoreLocation, *, timeout_s: float = 60) -> None:
        self._where = where
        self._timeout_s = timeout_s
        self.location = str(where)
        self.is_local = where.path is not None
        with self._errors("open", ""):
            self._objects = _open_backend(where, timeout_s)

    @classmethod
    def open(cls, location: str, *, timeout_s: float = 60) -> Self:
        """Open a store.

        Args:
            location: A directory (made if it does not exist), `s3://bucket/prefix` or `gs://bucket/prefix`.
            timeout_s: Seconds that a request may take, its retries included.

        Raises:
            StoreURIError: Not a location, or a hostile one.
            StoreError: The directory cannot be made, or it is a file.
        """
        return cls(parse_store_uri(location), timeout_s=timeout_s)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen, (type(self), self._where, self._timeout_s)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.location!r})"

    def put(self, key: str, data: Data, *, create: bool = False) -> None:
        """Write an object: after the return it is whole and durable, after an exception it is not visible.

        Args:
            key: Where to.
            data: Bytes, or an iterable of pieces that are written as they come.
            create: Fail if the object exists.

        Raises:
            AlreadyExistsError: `create` is set and the object exists.
        """
        validate_key(key)
        pieces = [data] if isinstance(data, bytes) else data
        with self._errors("write", key):
            if self._where.path is not None:
                _put_file(self._where.path / key, pieces, create)
            else:
                self._put_object(key, pieces, create)

    def put_unique(self, key: str, data: bytes) -> None:
        """Create an object whose bytes nobody else would write: an object that equals them is this one.

        A create-only request that is sent again after a lost answer finds its own object. The bytes must hold a
        nonce.

        Raises:
            AlreadyExistsError: The object exists with other bytes.
        """
        try:
            self.put(key, data, create=True)
        except AlreadyExistsError:
            if self.get(key) != data:
                raise

    def get(self, key: str) -> bytes:
        """Read an object.

        Raises:
            NotFoundError: There is none.
        """
        validate_key(key)
        with self._errors("read", key):
            return bytes(self._objects.get(key).bytes())

    def get_range(self, key: str, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to, not including, `end`; fewer where the object ends before.

        Raises:
            NotFoundError: There is no such object.
        """
        validate_key(key)
        if start >= end:
            return b""
        with self._errors("read", key):
            try:
                return bytes(self._objects.get_range(key, start=start, end=end))
            except ObstoreError:
                # A range that begins behind the end is an error of its own kind in each store.
                if self.size(key) <= start:
                    return b""
                raise

    def size(self, key: str) -> int:
        """Return the bytes of an object.

        Raises:
            NotFoundError: There is none.
        """
        validate_key(key)
        with self._errors("read", key):
            return int(self._objects.head(key)["size"])

    def exists(self, key: str) -> bool:
        """Whether there is such an object."""
        try:
            self.size(key)
        except NotFoundError:
            return False
        return True

    def list(self, prefix: str = "") -> Iterator[ObjectInfo]:
        """Yield the objects below a prefix, which ends at a segment, in the order of their keys."""
        with self._errors("list", prefix):
            pages = self._objects.list(validate_key(prefix) if prefix else None)
            found = [ObjectInfo(o["path"], o["size"], o["last_modified"]) for page in pages for o in page]
        yield from sorted(found, key=lambda info: info.key)

    def children(self, prefix: str = "") -> tuple[str, ...]:
        """Return the segments that follow a prefix and have further objects below them, sorted."""
        with self._errors("list", prefix):
            found = self._objects.list_with_delimiter(validate_key(prefix) if prefix else None)
        return tuple(sorted(path.rsplit("/", 1)[-1] for path in found["common_prefixes"]))

    def delete(self, key: str) -> None:
        """Remove an object; one that does not exist is removed already."""
        validate_key(key)
        try:
            with self._errors("delete", key):
                self._objects.delete(key)
        except NotFoundError:
            pass

    def local_path(self, key: str) -> Path | None:
        """Where the bytes lie, for memory mapping; None on an object store."""
        validate_key(key)
        return None if self._where.path is None else self._where.path / key

    def _put_object(self, key: str, pieces: Iterable[bytes | memoryview], create: bool) -> None:
        head, rest = _take(pieces, _SINGLE_PUT_BYTES)
        if create:
            obstore.put(self._objects, key, b"".join(chain([head], rest)), mode="create")
        elif len(head) < _SINGLE_PUT_BYTES:
            obstore.put(self._objects, key, head)
        else:
            obstore.put(self._objects, key, chain([head], rest))

    @contextmanager
    def _errors(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except (ObstoreAlreadyExistsError, FileExistsError) as error:
            raise AlreadyExistsError(f"{self.location}: {key} exists already") from error
        except FileNotFoundError as error:
            if "NoSuchBucket" in str(error):
                raise self._error(verb, key, error) from None
            raise NotFoundError(f"{self.location}: there is no {key or 'such directory'}") from None
        except (ObstoreError, OSError, ValueError) as error:
            # The chained exception would show what the server echoed: the message holds all that is of use.
            raise self._error(verb, key, error) from None

    def _error(self, verb: str, key: str, error: Exception) -> StoreError:
        reason = redact(str(error).split("\n\nDebug source:")[0].strip())
        return StoreError(
            f"cannot {verb} {f'{key} in ' if key else ''}the store {self.location}: {reason[:500]}",
            hint="Check that the store exists, can be reached from here and allows it with these credentials.",
        )


def _reopen(cls: Callable[..., ObjectStore], where: StoreLocation, timeout_s: float) -> ObjectStore:
    return cls(where, timeout_s=timeout_s)


def _open_backend(where: StoreLocation, timeout_s: float) -> Any:
    if where.path is not None:
        if where.path.exists() and not where.path.is_dir():
            raise StoreError(
                f"{where.path} is a file, and a store is a directory", "Name a directory, or a bucket."
            )
        return LocalStore(where.path, automatic_cleanup=True, mkdir=True)
    options: dict[str, Any] = {
        "prefix": where.prefix or None,
        # One request that stalls leaves time for two more.
        "client_options": {
            "timeout": timedelta(seconds=timeout_s / 3),
            "connect_timeout": timedelta(seconds=min(_CONNECT_TIMEOUT_S, timeout_s / 3)),
        },
        "retry_config": {"max_retries": 5, "retry_timeout": timedelta(seconds=timeout_s * 2 / 3)},
    }
    if where.scheme == "gs":
        return GCSStore(where.bucket, **options)
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3", os.environ.get("AWS_ENDPOINT_URL", ""))
    if endpoint.startswith("http://"):
        options["client_options"]["allow_http"] = True
    return S3Store(where.bucket, **options, **aws_options())


def _take(pieces: Iterable[bytes | memoryview], num_bytes: int) -> tuple[bytes, Iterator[bytes | memoryview]]:
    """Gather the first pieces until they have `num_bytes`; return them and the rest."""
    rest = iter(pieces)
    head = bytearray()
    for piece in rest:
        head += piece
        if len(head) >= num_bytes:
            break
    return bytes(head), rest


def _put_file(path: Path, pieces: Iterable[bytes | memoryview], create: bool) -> None:
    """Write, sync, then give the file its name: obstore names it before it is on the disk, and never syncs."""
    # obstore's listings leave out names that end in `#` and digits.
    staging = path.with_name(f"{path.name}#{secrets.randbits(64)}")
    file, new_directories = _create_file(staging)
    try:
        with file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        if create:
            os.link(staging, path)
        else:
            os.replace(staging, path)
    finally:
        staging.unlink(missing_ok=True)
    for directory in [path.parent, *new_directories]:
        _sync_directory(directory)


def _create_file(path: Path) -> tuple[BinaryIO, list[Path]]:
    """Create a file and its directories; return it and the directories that have a new entry."""
    missing = [parent for parent in path.parents if not parent.exists()]
    # A deletion in another process may remove an empty parent in between.
    for _ in range(10):
        with suppress(FileNotFoundError):
            path.parent.mkdir(parents=True, exist_ok=True)
            return open(path, "xb"), [directory.parent for directory in missing]
    raise NotADirectoryError(f"{path.parent} is removed again and again")


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
