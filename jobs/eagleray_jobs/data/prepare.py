"""From a source to rows of features in the store, once for all who need the same.

The pieces of a source are encoded independently of each other (`RunPieces`: in line, or by Ray Data), each into
one Arrow file per split, in a folder of this attempt alone. The manifest is written last and create-only: of two
preparations at once one wins, and the other one uses what the winner wrote.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import sha256
from typing import Any
from uuid import uuid4

from eagleray.config.schema import RunConfig
from eagleray.errors import AlreadyExistsError, DataError
from eagleray.store.code import hash_code
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray.tasks.base import Encoded, Example, Processor, Task
from eagleray_jobs.data.arrow import write_rows
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.data.examples import ExampleReader, SkippedRows
from eagleray_jobs.data.manifest import FORMAT, DataManifest, DataSummary, PreparedFile, data_prefix, manifest_key
from eagleray_jobs.data.rows import Piece, Source
from eagleray_jobs.data.sources import open_source, split_shares
from eagleray_jobs.data.split import SPLITS, Split

DATA_KEYS = (
    "validation_split", "test_split", "split_key", "columns", "source_lang", "target_lang", "labels",
    "max_source_length", "max_target_length", "on_bad_row",
)  # fmt: skip
"""Keys of `data` that decide what the rows are, besides the content of the source."""


@dataclass(frozen=True, slots=True)
class PieceResult:
    """What became of one piece.

    Attributes:
        files: The file of each split that has rows in it.
        num_tokens: Tokens by split.
        num_truncated: Rows that were cut, by split.
        num_skipped: Rows that could not be used.
        skipped: The first of them.
        error: Why the piece could not be encoded, instead of all the rest.
    """

    files: Mapping[Split, PreparedFile] = field(default_factory=dict)
    num_tokens: Mapping[Split, int] = field(default_factory=dict)
    num_truncated: Mapping[Split, int] = field(default_factory=dict)
    num_skipped: int = 0
    skipped: Sequence[str] = ()
    error: DataError | None = None


EncodePiece = Callable[[int, Piece], PieceResult]
"""Encodes a piece, given its number; picklable."""

RunPieces = Callable[[EncodePiece, Sequence[Piece]], Iterable[PieceResult]]
"""Runs the function on every piece and its number, and returns the results in the order of the pieces."""


def run_in_line(encode: EncodePiece, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
    """Encode one piece after the other, in this process."""
    return (encode(number, piece) for number, piece in enumerate(pieces))


def prepare(
    config: RunConfig,
    task: Task,
    store: ObjectStore,
    run_pieces: RunPieces = run_in_line,
    notify: Callable[[str], None] = lambda _: None,
    source: Source | None = None,
) -> PreparedData:
    """Prepare the data of a file, or find it prepared.

    Args:
        config: The file.
        task: Its task.
        store: Where the rows go.
        run_pieces: Runs the encoding.
        notify: Told what a user should see: rows, cuts, what was skipped.
        source: What `open_source` gave for this file, where that was called before.

    Raises:
        DataError: A file is missing, a row cannot be used, or there is nothing to train on.
    """
    started = time.monotonic()
    source = source or open_source(config.data)
    reader = ExampleReader(config.data, task.columns, task.input_columns, split_shares(config.data))
    fingerprint, processor = _identify(config, task, source, reader)
    if store.exists(manifest_key(fingerprint)):
        notify(f"data: prepared before ({data_prefix(fingerprint)})")
    else:
        processor = processor or task.build_processor(_training_examples(source, reader))
        _write(config, store, source, reader, fingerprint, processor.files(), run_pieces, started)
    prepared = PreparedData(store, fingerprint)
    for line in prepared.summary.lines():
        notify(line)
    return prepared


def find_prepared(config: RunConfig, task: Task, store: ObjectStore, source: Source) -> PreparedData | None:
    """Return the rows of a file where somebody has prepared them; nothing is written.

    Args:
        config: The file.
        task: Its task.
        store: Where they may be.
        source: What `open_source` gave for this file.

    Raises:
        DataError: There is nothing to train on.
    """
    reader = ExampleReader(config.data, task.columns, task.input_columns, split_shares(config.data))
    fingerprint, _ = _identify(config, task, source, reader)
    return PreparedData(store, fingerprint) if store.exists(manifest_key(fingerprint)) else None


def _identify(
    config: RunConfig, task: Task, source: Source, reader: ExampleReader
) -> tuple[str, Processor | None]:
    """Return the hash of all that the rows depend on, and the processor where that needs one."""
    model, data = config.model, config.data.model_dump(mode="json")
    parts: dict[str, Any] = {
        "format": FORMAT,
        "content": source.content,
        "data": {key: data[key] for key in DATA_KEYS},
        "task": config.task,
        "code": hash_code(config.code),  # a task of the user's may encode rows in another way tomorrow
        "tokenizer": model.tokenizer.model_dump(mode="json"),
        "family": [model.family, model.config],
        "factory": model.factory,
    }
    processor = None
    if model.pretrained is not None:
        # What a directory or a hub id holds may change: what is taken from it decides.
        processor = task.build_processor(_training_examples(source, reader))
        parts["processor"] = {name: sha256(data).hexdigest() for name, data in processor.files().items()}
    return sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32], processor


def _training_examples(source: Source, reader: ExampleReader) -> Iterator[Example]:
    skipped = SkippedRows()
    num_found = 0
    for piece in source.pieces:
        for _, split, example in reader.read(piece, skipped) if piece.split in (None, "train") else ():
            if split == "train":
                num_found += 1
                yield example
    if not num_found:
        raise DataError(
            f"{source.description} holds no row to train on; {skipped.count} could not be used",
            *skipped.shown[:1],
        )


def _write(
    config: RunConfig,
    store: ObjectStore,
    source: Source,
    reader: ExampleReader,
    fingerprint: str,
    processor_files: Mapping[str, bytes],
    run_pieces: RunPieces,
    started: float,
) -> None:
    folder = f"{data_prefix(fingerprint)}/{uuid4().hex[:12]}"
    encoder = PieceEncoder(config, reader, processor_files, store, folder)
    results = list(run_pieces(encoder, source.pieces))
    if errors := [result.error for result in results if result.error is not None]:
        raise errors[0]
    files = {split: [result.files[split] for result in results if split in result.files] for split in SPLITS}
    manifest = DataManifest(
        fingerprint=fingerprint,
        splits=files,
        processor={name: _put(store, f"{folder}/{name}", data) for name, data in processor_files.items()},
        summary=_summarize(source, files, results, started),
    )
    if not manifest.summary.num_rows["train"]:
        raise DataError(f"{source.description} holds no row to train on")
    try:
        store.put(manifest_key(fingerprint), manifest.to_json(), create=True)
    except AlreadyExistsError:
        # Somebody else prepared the same meanwhile. Theirs counts; the sweep removes our files.
        pass


def _summarize(
    source: Source, files: Mapping[Split, Sequence[PreparedFile]], results: Sequence[PieceResult], started: float
) -> DataSummary:
    skipped = SkippedRows()
    for result in results:
        skipped.add(result.num_skipped, result.skipped)
    return DataSummary(
        source=source.description,
        num_rows={split: sum(file.num_rows for file in files[split]) for split in SPLITS},
        num_tokens={split: sum(result.num_tokens.get(split, 0) for result in results) for split in SPLITS},
        num_truncated={split: sum(result.num_truncated.get(split, 0) for result in results) for split in SPLITS},
        num_skipped=skipped.count,
        skipped=skipped.shown,
        wall_s=round(time.monotonic() - started, 3),
    )


@dataclass
class PieceEncoder:
    """Encodes pieces; travels to the processes that do it, and opens the processor there once.

    Attributes:
        config: The file.
        reader: Turns rows into examples.
        processor_files: The processor.
        store: Where the rows go.
        folder: The folder of this attempt.
    """

    config: RunConfig
    reader: ExampleReader
    processor_files: Mapping[str, bytes]
    store: ObjectStore
    folder: str

    def __call__(self, number: int, piece: Piece) -> PieceResult:
        """Encode a piece and write its files; a row that stops the preparation is an error in the result."""
        try:
            return self._encode(number, piece)
        except DataError as error:
            return PieceResult(error=error)

    def _encode(self, number: int, piece: Piece) -> PieceResult:
        skipped = SkippedRows()
        kept: dict[Split, list[tuple[Encoded, Example]]] = {split: [] for split in SPLITS}
        for row, split, example in self.reader.read(piece, skipped):
            try:
                kept[split].append((self._task.encode(example, self._processor), example))
            except DataError as error:
                self.reader.refuse(row, error.message, skipped)
        rows = {split: found for split, found in kept.items() if found}
        return PieceResult(
            files={split: self._put(number, split, found) for split, found in rows.items()},
            num_tokens={split: sum(encoded.length for encoded, _ in found) for split, found in rows.items()},
            num_truncated={split: sum(encoded.truncated for encoded, _ in found) for split, found in rows.items()},
            num_skipped=skipped.count,
            skipped=skipped.shown,
        )

    def _put(self, number: int, split: Split, rows: Sequence[tuple[Encoded, Example]]) -> PreparedFile:
        data = write_rows(
            [encoded.features for encoded, _ in rows],
            [encoded.length for encoded, _ in rows],
            [example for _, example in rows],
        )
        return _put(self.store, f"{self.folder}/{split}-{number:05d}.arrow", data, len(rows))

    @cached_property
    def _task(self) -> Task:
        return load_task(self.config)

    @cached_property
    def _processor(self) -> Processor:
        return self._task.load_processor(self.processor_files)

    def __getstate__(self) -> dict[str, Any]:
        # The processor may hold what cannot be pickled: it is opened again from its files.
        return {name: value for name, value in self.__dict__.items() if name not in ("_task", "_processor")}


def _put(store: ObjectStore, key: str, data: bytes, num_rows: int = 0) -> PreparedFile:
    file = PreparedFile(key, len(data), sha256(data).hexdigest(), num_rows)
    try:
        store.put(key, data, create=True)
    except AlreadyExistsError:
        # A worker that wrote it ended, or seemed to, before it said so, and its piece ran again.
        if sha256(store.get(key)).hexdigest() != file.sha256:
            raise
    return file
