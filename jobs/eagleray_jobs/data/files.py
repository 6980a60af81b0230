"""The user's files: finding them, and cutting them into pieces that can be read apart.

A file is read once from front to back, for its SHA-256 and for the places where every so many rows begin. The
pieces are then read by range, on any machine, from a directory and from an object store alike.
"""

from __future__ import annotations

import csv
import glob
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from io import SEEK_CUR, SEEK_END, SEEK_SET, BufferedReader, RawIOBase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, BinaryIO, Literal

from eagleray.errors import DataError
from eagleray.store.objects import ObjectStore

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Format = Literal["jsonl", "csv", "tsv", "parquet", "text"]
FORMATS: dict[str, Format] = {
    ".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
}  # fmt: skip
BUFFER_BYTES = 8 * 1024 * 1024
ROWS_PER_PIECE = 10_000
_WILDCARDS = frozenset("*?[")


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file that holds rows.

    Attributes:
        uri: An absolute path, or `s3://bucket/key`, `gs://bucket/key`.
        size: Its bytes.
    """

    uri: str
    size: int

    @property
    def folder(self) -> str:
        """Where it lies, with the closing slash: paths in its rows are relative to it."""
        return self.uri[: self.uri.rindex("/") + 1]

    @property
    def is_local(self) -> bool:
        """Whether it is a path."""
        return "://" not in self.uri

    def open(self) -> BinaryIO:
        """Open it for reading; it can seek.

        Raises:
            DataError: It cannot be read.
        """
        try:
            return open(self.uri, "rb") if self.is_local else _open_object(self)
        except OSError as error:
            raise DataError(f"cannot read {self.uri}: {error.strerror or error}") from None

    def read(self, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to, not including, `end`.

        Raises:
            DataError: It cannot be read, or is shorter than it was.
        """
        with self.open() as file:
            file.seek(start)
            data = file.read(end - start)
        if len(data) < end - start:
            raise DataError(
                f"{self.uri} became shorter while it was read: {start + len(data)} bytes, {end} before"
            )
        return data


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive lines of a file.

    Attributes:
        start: First byte.
        end: The byte after the last one.
        first_line: Number of the first line, from 1.
    """

    start: int
    end: int
    first_line: int


@dataclass(frozen=True, slots=True)
class FileIndex:
    """What one pass over a file finds out.

    Attributes:
        sha256: Of the content.
        num_rows: The rows that it seems to hold, a header included.
        spans: About `ROWS_PER_PIECE` rows each; empty for an empty file.
    """

    sha256: str
    num_rows: int
    spans: tuple[Span, ...]


def find_files(patterns: str | Sequence[str]) -> list[InputFile]:
    """Find the files that paths, globs or store locations name: in the order given, a glob's sorted by name.

    Raises:
        DataError: A path does not exist, a glob matches nothing, or a file is named twice.
    """
    found: list[InputFile] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matches = _find_objects(pattern) if "://" in pattern else _find_local(pattern)
        if not matches:
            kind = "matches no file" if _WILDCARDS & set(pattern) else "does not exist"
            raise DataError(
                f"{pattern} {kind}", "check the path under data; it is relative to the file that names it"
            )
        found += matches
    if twice := sorted({file.uri for file in found if [each.uri for each in found].count(file.uri) > 1}):
        raise DataError(f"{', '.join(twice)} is named twice", "its rows would count twice: name each file once")
    return found


def format_of(file: InputFile) -> Format:
    """Return the format that the suffix of a file says.

    Raises:
        DataError: The suffix is unknown.
    """
    suffix = PurePosixPath(file.uri).suffix.lower()
    if suffix not in FORMATS:
        raise DataError(
            f"{file.uri}: the suffix {suffix!r} is unknown; known are {', '.join(FORMATS)}",
            "plain text of two languages is given as {source: ..., target: ...}",
        )
    return FORMATS[suffix]


def index_lines(file: InputFile, *, quoted: bool = False, rows_per_piece: int | None = None) -> FileIndex:
    """Find where every so many rows begin.

    Args:
        file: The file.
        quoted: A line end between double quotes does not end a row (CSV).
        rows_per_piece: How many; default: `ROWS_PER_PIECE`.
    """
    rows_per_piece = rows_per_piece or ROWS_PER_PIECE
    with file.open() as stream:
        lines = _Lines(stream)
        starts = [(0, 1)]
        num_rows = 0
        while lines.skip_row(quoted):
            num_rows += 1
            if num_rows % rows_per_piece == 0:
                starts.append((lines.offset, lines.num_read + 1))
    bounds = [start for start, _ in starts[1:]] + [lines.offset]
    spans = (Span(start, end, line) for (start, line), end in zip(starts, bounds, strict=True))
    return FileIndex(lines.digest.hexdigest(), num_rows, tuple(span for span in spans if span.start < span.end))


def hash_content(file: InputFile) -> str:
    """Return the SHA-256 of a file."""
    digest = sha256()
    with file.open() as stream:
        while block := stream.read(BUFFER_BYTES):
            digest.update(block)
    return digest.hexdigest()


class _Lines:
    """The lines of a file, with the place in it and the hash of what was read."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._records = csv.reader((line.decode("latin-1") for line in self), strict=True)
        self.offset = 0
        self.num_read = 0
        self.digest = sha256()

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        line = next(self._stream)
        self.offset += len(line)
        self.num_read += 1
        self.digest.update(line)
        return line

    def skip_row(self, quoted: bool) -> bool:
        """Pass over a row; return whether there was one."""
        try:
            return next(self._records if quoted else self, None) is not None
        except csv.Error:
            return True  # The row is found again, and reported, when its piece is read.


class _ObjectReader(RawIOBase):
    """An object of a store as a file."""

    def __init__(self, store: ObjectStore, key: str, size: int) -> None:
        self._store, self._key, self._size = store, key, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        end = min(self._position + len(view), self._size)
        data = self._store.get_range(self._key, self._position, end)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def seek(self, offset: int, whence: int = SEEK_SET) -> int:
        self._position = offset + {SEEK_SET: 0, SEEK_CUR: self._position, SEEK_END: self._size}[whence]
        return self._position

    def tell(self) -> int:
        return self._position


def _open_object(file: InputFile) -> BinaryIO:
    bucket, key = _split_uri(file.uri)
    return BufferedReader(_ObjectReader(ObjectStore.open(bucket), key, file.size), BUFFER_BYTES)


def _find_local(pattern: str) -> list[InputFile]:
    names = sorted(glob.glob(pattern, recursive=True)) if not Path(pattern).exists() else [pattern]
    paths = [Path(name).absolute() for name in names]
    if directories := [path for path in paths if path.is_dir() and len(paths) == 1]:
        raise DataError(f"{directories[0]} is a directory", f"name its files: {pattern.rstrip('/')}/*.jsonl")
    return [InputFile(str(path), path.stat().st_size) for path in paths if path.is_file()]


def _find_objects(pattern: str) -> list[InputFile]:
    bucket, key = _split_uri(pattern)
    store = ObjectStore.open(bucket)
    if not _WILDCARDS & set(key):
        return [InputFile(pattern, store.size(key))] if store.exists(key) else []
    fixed = key[: min(key.index(wildcard) for wildcard in _WILDCARDS & set(key))]
    folder = fixed.rpartition("/")[0]
    return [
        InputFile(f"{bucket}/{info.key}", info.size) for info in store.list(folder) if fnmatchcase(info.key, key)
    ]


def _split_uri(uri: str) -> tuple[str, str]:
    """Split `s3://bucket/a/b.csv` into the bucket and the key."""
    scheme, _, rest = uri.partition("://")
    bucket, _, key = rest.partition("/")
    return f"{scheme}://{bucket}", key
