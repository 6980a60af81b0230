"""Answers to a whole file, in its order, by a pool of model actors.

The input is cut into chunks by place. As soon as a chunk is answered it is kept as a part, under a name that the
input, the version and the options decide, and only then does its actor begin another one. A run that was killed
finds its parts again: it does at most one chunk of each actor twice, until the output has appeared, whole, at the
end. Which rows are batched together depends on their place in the input alone, so that any number of actors writes
the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from eagleray.config.schema import RunConfig
from eagleray.engine import Engine, ItemError
from eagleray.errors import DataError, UsageError
from eagleray.store.objects import ObjectStore
from eagleray.tasks.base import Answer, Task
from eagleray_jobs.data.examples import ExampleReader
from eagleray_jobs.data.files import InputFile, find_files
from eagleray_jobs.data.rows import Piece, Row
from eagleray_jobs.data.split import SplitShares
from eagleray_jobs.pool import LoadEngine, RunItems
from eagleray_jobs.rowformats import (
    ROWS_PER_CHUNK,
    Chunks,
    RowWriter,
    cut_input,
    format_of_path,
    parquet_from_json,
)

FORMAT = 1
ERROR_COLUMN = "error"
MAX_SHOWN_ERRORS = 20
PARTS_SUFFIX = ".parts"


@dataclass(frozen=True, slots=True)
class PredictReport:
    """What a prediction did.

    Attributes:
        ref: The version that answered.
        input: The file that was read.
        output: The file that was written.
        num_rows: Rows of both.
        num_errors: Rows that could not be answered; each says so in its place.
        errors: The first of them, with file, line and reason.
        num_resumed: Rows that an interrupted run had answered before.
        wall_s: Seconds.
    """

    ref: str
    input: str
    output: str
    num_rows: int
    num_errors: int
    errors: Sequence[str]
    num_resumed: int
    wall_s: float

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Part:
    """The answers to one chunk.

    Attributes:
        data: Rows of the output.
        num_rows: How many.
        num_errors: Rows that could not be answered.
        errors: The first of them.
    """

    data: bytes
    num_rows: int
    num_errors: int = 0
    errors: Sequence[str] = ()


@dataclass(frozen=True)
class ChunkAnswerer:
    """Answers chunks; made once in each worker.

    Attributes:
        load: Loads the model.
        reader: Turns rows into items.
        writer: Writes rows of the output.
        options: What a request may set: `num_beams`, `max_new_tokens`.
    """

    load: LoadEngine
    reader: ExampleReader
    writer: RowWriter
    options: Mapping[str, Any]

    def __call__(self) -> Callable[[tuple[int, Piece]], tuple[int, Part]]:
        """Load the model; return what answers a chunk, which has a number."""
        engine = self.load()
        return lambda chunk: (chunk[0], self._answer(engine, chunk[1]))

    def _answer(self, engine: Engine, piece: Piece) -> Part:
        rows = list(piece.rows())
        read = [self.reader.example(row, piece.folder) for row in rows]
        good = [example for example, problem in read if problem is None]
        answers = iter(engine.answer(good, self.options))
        found = [next(answers) if problem is None else problem for _, problem in read]
        written = [self._row(row, answer) for row, answer in zip(rows, found, strict=True)]
        errors = [f"{row.where}: {out[ERROR_COLUMN]}" for row, out in zip(rows, written, strict=True)
                  if out[ERROR_COLUMN]]  # fmt: skip
        return Part(self.writer.part(written), len(rows), len(errors), errors[:MAX_SHOWN_ERRORS])

    def _row(self, row: Row, answer: Answer | ItemError | str) -> dict[str, Any]:
        values = dict(row.values or {})
        if isinstance(answer, str):
            return values | {ERROR_COLUMN: answer}
        if isinstance(answer, ItemError):
            return values | {ERROR_COLUMN: str(answer)}
        added = answer_columns(answer)
        if taken := sorted({*added, ERROR_COLUMN} & set(values)):
            problem = f"the row has a column {', '.join(map(repr, taken))}, where the answer would go"
            return values | {ERROR_COLUMN: problem}
        return values | added | {ERROR_COLUMN: None}


def predict(
    config: RunConfig,
    ref: str,
    load: LoadEngine,
    run_items: RunItems,
    task: Task,
    input_path: str,
    output_path: str,
    *,
    options: Mapping[str, Any] | None = None,
    notify: Callable[[str], None] = lambda _: None,
) -> PredictReport:
    """Answer every row of a file.

    Args:
        config: The file of the version: its columns and languages.
        ref: Full reference of the version.
        load: Loads it.
        run_items: Runs the work.
        task: Its task.
        input_path: .jsonl, .csv, .tsv, .parquet; any other suffix is plain text, a line each.
        output_path: Where to; its suffix decides the format. Plain text holds the answers alone, the others the
            rows with columns added.
        options: What a request may set.
        notify: Told about the progress.

    Raises:
        UsageError: The output cannot be written, or has a column of the answers already.
        DataError: The input cannot be read.
    """
    started = time.monotonic()
    file = _only_file(input_path)
    chunks = cut_input(file, task.input_columns[0])
    writer = RowWriter(format_of_path(output_path), _output_columns(chunks, task), _ANSWERS[task.route][0])
    _check_columns(chunks.columns, writer, task)
    parts = Parts.open(output_path, _identify(chunks, ref, writer, config, options or {}))
    done = parts.done()
    missing = [number for number in range(len(chunks.pieces)) if number not in done]
    if done:
        notify(f"predict: {len(done)} of {len(chunks.pieces)} chunks were answered before")
    reader = ExampleReader(config.data, task.input_columns, task.input_columns, SplitShares(0, 0))
    answerer = ChunkAnswerer(load, reader, writer, options or {})
    for number, part in run_items(answerer, [(number, chunks.pieces[number]) for number in missing]):
        done[number] = parts.keep(number, part)
        notify(f"predict: {len(done)} of {len(chunks.pieces)} chunks")
    parts.join(writer, [done[number]["sha256"] for number in sorted(done)])
    return _report(ref, file, output_path, done, missing, started)


class Parts:
    """What is answered already: `<output>.parts/<identity>/`, beside the output.

    A part is written whole and then noted (its record is create-only and written last), so that one that was cut
    off by an interruption does not count.
    """

    def __init__(self, store: ObjectStore, output: str, identity: str) -> None:
        self._store, self._output, self._identity = store, output, identity

    @classmethod
    def open(cls, output: str, identity: str) -> Parts:
        """Open the parts of an output; those of another input, version or options are removed.

        Raises:
            UsageError: There is a directory in the way.
        """
        if "://" not in output and Path(output).is_dir():
            raise UsageError(f"{output} is a directory", "name a file")
        parts = cls(ObjectStore.open(output + PARTS_SUFFIX), output, identity)
        for info in list(parts._store.list()):
            if not info.key.startswith(f"{identity}/"):
                parts._store.delete(info.key)
        return parts

    def done(self) -> dict[int, dict[str, Any]]:
        """Return the records of the parts that are whole, by the number of their chunk."""
        keys = [info.key for info in self._store.list() if info.key.endswith(".json")]
        records = [json.loads(self._store.get(key)) for key in keys]
        return {record["number"]: record for record in records}

    def keep(self, number: int, part: Part) -> dict[str, Any]:
        """Write a part and its record; return the record."""
        self._store.put(self._key(number, "part"), part.data)
        record = {"number": number, "num_rows": part.num_rows, "num_errors": part.num_errors,
                  "errors": list(part.errors), "sha256": sha256(part.data).hexdigest()}  # fmt: skip
        self._store.put(self._key(number, "json"), json.dumps(record).encode())
        return record

    def join(self, writer: RowWriter, hashes: Sequence[str]) -> None:
        """Make the output of its parts, and remove them.

        Raises:
            DataError: A part is not what was written.
        """

        def read() -> Iterator[bytes]:
            return (self._read(number, digest) for number, digest in enumerate(hashes))

        with TemporaryDirectory(prefix="eagleray-predict-") as scratch:
            if writer.format == "parquet":
                path = str(Path(scratch, "output.parquet"))
                parquet_from_json(read, path)
                _write_whole(self._output, _blocks(path))
            else:
                _write_whole(self._output, _with_header(writer.header(), read()))
        for info in list(self._store.list()):
            self._store.delete(info.key)
        if self._store.is_local:
            shutil.rmtree(self._store.location, ignore_errors=True)

    def _read(self, number: int, digest: str) -> bytes:
        data = self._store.get(self._key(number, "part"))
        if sha256(data).hexdigest() != digest:
            raise DataError(
                f"{self._store.location}: {self._key(number, 'part')} is damaged",
                "remove the folder and run again",
            )
        return data

    def _key(self, number: int, suffix: str) -> str:
        return f"{self._identity}/{number:08d}.{suffix}"


_ANSWERS: dict[str, tuple[str, ...]] = {
    "translate": ("translation",),
    "classify": ("prediction", "score", "scores"),
    "predict": ("answer",),
}
"""Columns that an output has beside those of the input, by route; the first one is the line of plain text."""


def answer_columns(answer: Answer) -> dict[str, Any]:
    """Return an answer as columns of the output."""
    if set(answer) == {"text"}:
        return {"translation": answer["text"]}
    if set(answer) == {"label", "score", "scores"}:
        return {"prediction": answer["label"], "score": answer["score"], "scores": answer["scores"]}
    return {"answer": answer}


def _output_columns(chunks: Chunks, task: Task) -> tuple[str, ...]:
    return (*chunks.columns, *_ANSWERS[task.route], ERROR_COLUMN)


def _check_columns(columns: Sequence[str], writer: RowWriter, task: Task) -> None:
    taken = sorted({*_ANSWERS[task.route], ERROR_COLUMN} & set(columns))
    if taken:
        raise UsageError(
            f"the input has a column {', '.join(map(repr, taken))}, where the answers would go", "rename it"
        )
    if writer.format in ("csv", "tsv") and not columns:
        raise UsageError(
            f"rows of JSONL have no fixed columns, which a {writer.format} file needs", "write .jsonl or .parquet"
        )


def _identify(chunks: Chunks, ref: str, writer: RowWriter, config: RunConfig, options: Mapping[str, Any]) -> str:
    """Return the hash of all that the parts depend on."""
    parts = [FORMAT, ROWS_PER_CHUNK, chunks.sha256, ref, asdict(writer), config.data.columns, dict(options)]
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _only_file(path: str) -> InputFile:
    files = find_files(path)
    if len(files) != 1:
        raise UsageError(f"{path} names {len(files)} files", "predict takes one file at a time")
    return files[0]


def _report(
    ref: str,
    file: InputFile,
    output: str,
    done: Mapping[int, Mapping[str, Any]],
    missing: Sequence[int],
    started: float,
) -> PredictReport:
    records = [done[number] for number in sorted(done)]
    errors = [error for record in records for error in record["errors"]]
    return PredictReport(
        ref=ref,
        input=file.uri,
        output=output,
        num_rows=sum(record["num_rows"] for record in records),
        num_errors=sum(record["num_errors"] for record in records),
        errors=errors[:MAX_SHOWN_ERRORS],
        num_resumed=sum(record["num_rows"] for record in records if record["number"] not in set(missing)),
        wall_s=round(time.monotonic() - started, 3),
    )


def _with_header(header: bytes, parts: Iterator[bytes]) -> Iterator[bytes]:
    if header:
        yield header
    yield from parts


def _blocks(path: str) -> Iterator[bytes]:
    with open(path, "rb") as file:
        while block := file.read(1024 * 1024):
            yield block


def _write_whole(output: str, data: Iterator[bytes]) -> None:
    """Write a file that appears whole, or not at all."""
    if "://" in output:
        folder, _, name = output.rpartition("/")
        ObjectStore.open(folder).put(name, data)
        return
    staging = Path(f"{output}{PARTS_SUFFIX}", "output")
    with staging.open("wb") as file:
        for block in data:
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
    os.replace(staging, output)
