"""Pieces of the user's files, read as rows; what cannot be read is a row with a problem, never an exception."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from eagleray.errors import DataError
from eagleray_jobs.data.files import InputFile, Span
from eagleray_jobs.data.rows import Row
from eagleray_jobs.data.split import Split

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
PARQUET_BATCH_ROWS = 1024


@dataclass(frozen=True, slots=True)
class JsonLinesPiece:
    """Lines of JSON objects."""

    file: InputFile
    span: Span
    split: Split | None

    @property
    def folder(self) -> str:
        """Where paths in the rows begin."""
        return self.file.folder

    def rows(self) -> Iterator[Row]:
        """Read the rows."""
        for number, line in _lines(self.file, self.span):
            yield _json_row(f"{self.file.uri}:{number}", line)


@dataclass(frozen=True, slots=True)
class DelimitedPiece:
    """Lines of a CSV file (quotes as in RFC 4180) or a TSV file (no quotes, no tabs or line ends in a value)."""

    file: InputFile
    span: Span
    split: Split | None
    header: tuple[str, ...]
    delimiter: str

    @property
    def folder(self) -> str:
        """Where paths in the rows begin."""
        return self.file.folder

    def rows(self) -> Iterator[Row]:
        """Read the rows; the header is not one."""
        lines = _Numbered(_read(self.file, self.span).decode("utf-8", "surrogateescape"))
        reader = _csv_reader(lines, self.delimiter)
        if self.span.start == 0:
            next(reader)
        while True:
            place = f"{self.file.uri}:{self.span.first_line + lines.num_read}"
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield Row(place, None, f"is no valid row: {error}", raw=lines.last)
                continue
            if fields is None:
                return
            yield self._row(place, fields)

    def _row(self, place: str, fields: list[str]) -> Row:
        if any(_has_bad_bytes(field) for field in fields):
            return Row(place, None, "is not valid UTF-8", raw=ascii(fields))
        if len(fields) != len(self.header):
            problem = f"has {len(fields)} columns, the header has {len(self.header)}" if fields else "is empty"
            return Row(place, None, problem, raw=repr(fields))
        return Row(place, dict(zip(self.header, fields, strict=True)))


@dataclass(frozen=True, slots=True)
class ParallelPiece:
    """The same lines of a text and of its translation."""

    source: InputFile
    source_span: Span
    target: InputFile
    target_span: Span
    split: Split | None

    @property
    def folder(self) -> str:
        """Where paths in the rows begin."""
        return self.source.folder

    def rows(self) -> Iterator[Row]:
        """Read the rows."""
        sources, targets = _lines(self.source, self.source_span), _lines(self.target, self.target_span)
        for (number, source), (_, target) in zip(sources, targets, strict=True):
            place = f"{self.source.uri}:{number}"
            try:
                yield Row(place, {"source": source.decode(), "target": target.decode()})
            except UnicodeDecodeError as error:
                yield Row(place, None, _describe(error), raw=f"{source!r} | {target!r}")


@dataclass(frozen=True, slots=True)
class ParquetPiece:
    """Rows of one row group of a Parquet file.

    Attributes:
        file: The file.
        row_group: Which group.
        first_row: Number of the group's first row in the file, from 1.
        split: The split of its rows.
        start: The first row in the group that belongs to the piece.
        stop: The row behind the last one; None: all.
    """

    file: InputFile
    row_group: int
    first_row: int
    split: Split | None
    start: int = 0
    stop: int | None = None

    @property
    def folder(self) -> str:
        """Where paths in the rows begin."""
        return self.file.folder

    def rows(self) -> Iterator[Row]:
        """Read the rows, a batch at a time."""
        position = 0
        for batch in open_parquet(self.file).iter_batches(PARQUET_BATCH_ROWS, row_groups=[self.row_group]):
            first, last = max(self.start - position, 0), batch.num_rows
            last = last if self.stop is None else min(last, self.stop - position)
            for i in range(first, last):
                yield _parquet_row(f"{self.file.uri}:{self.first_row + position + i}", batch.slice(i, 1))
            position += batch.num_rows
            if self.stop is not None and position >= self.stop:
                return


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Lines of plain text."""

    file: InputFile
    span: Span
    column: str
    split: Split | None = None

    @property
    def folder(self) -> str:
        """Where paths in the rows begin."""
        return self.file.folder

    def rows(self) -> Iterator[Row]:
        """Read the rows."""
        for number, line in _lines(self.file, self.span):
            place = f"{self.file.uri}:{number}"
            try:
                yield Row(place, {self.column: line.decode()})
            except UnicodeDecodeError as error:
                yield Row(place, None, _describe(error), raw=repr(line))


def read_header(file: InputFile, span: Span, delimiter: str) -> tuple[str, ...]:
    """Read the column names of a CSV or TSV file.

    Raises:
        DataError: They are missing, not UTF-8, or one stands twice.
    """
    try:
        text = _read(file, span).decode("utf-8", "surrogateescape")
        header = tuple(next(_csv_reader(_Numbered(text), delimiter)))
    except (csv.Error, StopIteration) as error:
        raise DataError(f"{file.uri}:1: the header cannot be read: {error}") from None
    if any(_has_bad_bytes(name) for name in header):
        raise DataError(f"{file.uri}:1: the header is not valid UTF-8: {header!a}")
    if len(set(header)) < len(header):
        raise DataError(f"{file.uri}:1: a column stands twice in the header: {', '.join(header)}")
    return header


def open_parquet(file: InputFile) -> Any:
    """Open a Parquet file.

    Raises:
        DataError: It is none.
    """
    import pyarrow as pa
    from pyarrow import parquet

    try:
        return parquet.ParquetFile(file.uri if file.is_local else pa.PythonFile(file.open(), mode="r"))
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{file.uri} is no Parquet file: {error}") from None


class _Numbered:
    """Lines with their ends, counting what was read."""

    def __init__(self, text: str) -> None:
        # str.splitlines also cuts at characters that may stand inside of a value.
        self._lines = iter(text.removesuffix("\n").split("\n")) if text else iter(())
        self.num_read = 0
        self.last = ""

    def __iter__(self) -> _Numbered:
        return self

    def __next__(self) -> str:
        self.last = next(self._lines)
        self.num_read += 1
        return f"{self.last}\n"


def _csv_reader(lines: Iterator[str], delimiter: str) -> Iterator[list[str]]:
    if delimiter == "\t":
        return csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
    return csv.reader(lines, delimiter=delimiter, strict=True)


def _read(file: InputFile, span: Span) -> bytes:
    data = file.read(span.start, span.end)
    return data.removeprefix(BYTE_ORDER_MARK) if span.start == 0 else data


def _lines(file: InputFile, span: Span) -> Iterator[tuple[int, bytes]]:
    lines = _read(file, span).removesuffix(b"\n").split(b"\n")
    for number, line in enumerate(lines, span.first_line):
        yield number, line.removesuffix(b"\r")


def _json_row(place: str, line: bytes) -> Row:
    if not line.strip():
        return Row(place, None, "is empty", raw="")
    try:
        values = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return Row(place, None, _describe(error), raw=repr(line))
    except (ValueError, RecursionError) as error:
        return Row(place, None, f"is not valid JSON: {error}", raw=line.decode())
    if not isinstance(values, dict):
        return Row(place, None, f"is a JSON {type(values).__name__}, an object was expected", raw=line.decode())
    return Row(place, values)


def _parquet_row(place: str, row: Any) -> Row:
    try:
        values: Mapping[str, Any] = row.to_pylist()[0]
    except UnicodeDecodeError as error:
        return Row(place, None, _describe(error), raw=repr(error.object))
    return Row(place, values)


def _describe(error: UnicodeDecodeError) -> str:
    return f"is not valid UTF-8: byte 0x{error.object[error.start]:02x} at position {error.start}"


def _has_bad_bytes(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)
