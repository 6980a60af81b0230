"""The files of `predict`: the input in chunks of rows, and the output as bytes of each chunk."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import PurePosixPath
from typing import Any

from eagleray_jobs.data.files import FORMATS, Format, InputFile, hash_content, index_lines
from eagleray_jobs.data.readers import (
    DelimitedPiece,
    JsonLinesPiece,
    ParquetPiece,
    TextPiece,
    open_parquet,
    read_header,
)
from eagleray_jobs.data.rows import Piece

ROWS_PER_CHUNK = 1000
"""Rows that are answered together and written together: what an interruption costs at most, per worker."""


@dataclass(frozen=True, slots=True)
class Chunks:
    """An input file, cut.

    Attributes:
        pieces: Its parts, in order.
        columns: Names of its columns; empty where only the rows know (JSONL).
        sha256: Of its content.
    """

    pieces: Sequence[Piece]
    columns: tuple[str, ...]
    sha256: str


def format_of_path(path: str) -> Format:
    """Return the format that a suffix says; any other suffix is plain text."""
    return FORMATS.get(PurePosixPath(path).suffix.lower(), "text")


def cut_input(file: InputFile, column: str) -> Chunks:
    """Cut an input file into chunks.

    Args:
        file: The file.
        column: The column that a line of plain text is.

    Raises:
        DataError: It cannot be read.
    """
    kind = format_of_path(file.uri)
    if kind == "parquet":
        return _cut_parquet(file)
    index = index_lines(file, quoted=kind == "csv", rows_per_piece=ROWS_PER_CHUNK)
    if kind == "jsonl":
        return Chunks([JsonLinesPiece(file, span, None) for span in index.spans], (), index.sha256)
    if kind == "text":
        return Chunks([TextPiece(file, span, column) for span in index.spans], (column,), index.sha256)
    delimiter = "\t" if kind == "tsv" else ","
    header = read_header(file, index.spans[0], delimiter) if index.spans else ()
    pieces = [DelimitedPiece(file, span, None, header, delimiter) for span in index.spans]
    return Chunks(pieces, header, index.sha256)


def _cut_parquet(file: InputFile) -> Chunks:
    parquet = open_parquet(file)
    pieces: list[Piece] = []
    first_row = 1
    for group in range(parquet.metadata.num_row_groups):
        num_rows = parquet.metadata.row_group(group).num_rows
        for start in range(0, num_rows, ROWS_PER_CHUNK):
            pieces.append(ParquetPiece(file, group, first_row, None, start, min(start + ROWS_PER_CHUNK, num_rows)))
        first_row += num_rows
    return Chunks(pieces, tuple(parquet.schema_arrow.names), hash_content(file))


@dataclass(frozen=True, slots=True)
class RowWriter:
    """Writes rows of an output in its format; the parts of a file, one after the other, are the file.

    Attributes:
        format: The format of the output. Rows of Parquet are kept as JSON until the file is complete.
        columns: Columns of a CSV or TSV file.
        answer_column: What a line of plain text is.
    """

    format: Format
    columns: tuple[str, ...]
    answer_column: str

    def header(self) -> bytes:
        """Return what stands before the first row."""
        if self.format not in ("csv", "tsv"):
            return b""
        return self._delimited([list(self.columns)])

    def part(self, rows: Sequence[Mapping[str, Any]]) -> bytes:
        """Return rows as bytes."""
        if self.format == "text":
            return "".join(f"{_one_line(row.get(self.answer_column))}\n" for row in rows).encode()
        if self.format in ("csv", "tsv"):
            return self._delimited([[_cell(row.get(column)) for column in self.columns] for row in rows])
        return "".join(f"{json.dumps(_plain(row), ensure_ascii=False)}\n" for row in rows).encode()

    def _delimited(self, rows: Sequence[Sequence[str]]) -> bytes:
        if self.format == "tsv":
            return "".join("\t".join(map(_one_line, row)) + "\n" for row in rows).encode()
        text = StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        return text.getvalue().encode()


def parquet_from_json(parts: Callable[[], Iterator[bytes]], path: str) -> None:
    """Write JSON rows as a Parquet file, a row group per part.

    Args:
        parts: Reads the parts; it is called twice, because all of them decide the types of the columns.
        path: The file to write.
    """
    import pyarrow as pa
    from pyarrow import parquet

    schemas = [table.schema for part in parts() if (table := _table(part)).num_columns]
    schema = pa.unify_schemas(schemas, promote_options="permissive") if schemas else pa.schema([])
    with parquet.ParquetWriter(path, schema) as writer:
        for part in parts():
            rows = [json.loads(line) for line in part.splitlines()]
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _table(part: bytes) -> Any:
    import pyarrow as pa

    return pa.Table.from_pylist([json.loads(line) for line in part.split(b"\n") if line])


def _plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out bytes, which JSON cannot hold, and write dates and the like as text."""
    kept = {name: value for name, value in row.items() if not isinstance(value, bytes)}
    plain: dict[str, Any] = json.loads(json.dumps(kept, default=str))
    return plain


def _cell(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _one_line(value: object) -> str:
    """Return a value as text without line ends and tabs: one row stays one line."""
    return " ".join(_cell(value).replace("\t", " ").splitlines())
