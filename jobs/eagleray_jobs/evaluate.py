"""Scores of a committed model on held-out examples, beside those of simple baselines.

Examples are answered piece by piece and batch by batch, by their place in the source and never by who answers
them, and scored all together at the end: any number of workers gives the same numbers.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import islice
from typing import Any

from eagleray.config.schema import RunConfig
from eagleray.engine import Engine, ItemError
from eagleray.errors import DataError
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray.tasks.base import Answer, Example
from eagleray_jobs.baselines import baselines
from eagleray_jobs.data.examples import ExampleReader, SkippedRows
from eagleray_jobs.data.rows import Piece, Source
from eagleray_jobs.data.sources import open_source, split_shares
from eagleray_jobs.data.split import Split
from eagleray_jobs.pool import LoadEngine, RunItems

EXAMPLES_PER_CALL = 512
"""Examples that are sorted by length and answered together."""


@dataclass(frozen=True, slots=True)
class EvaluateReport:
    """What an evaluation found.

    Attributes:
        ref: The version.
        split: Which examples.
        source: Where they came from.
        num_examples: How many.
        num_skipped: Rows that could not be used (`data.on_bad_row: skip`).
        num_failed: Examples that the model could not answer; they count as wrong.
        scores: By metric; `<metric>/<kind>` is that of one kind.
        baselines: Scores of each baseline.
        signatures: How the metrics were computed, where their authors ask to say so.
        wall_s: Seconds.
        created: When, UTC.
    """

    ref: str
    split: Split
    source: str
    num_examples: int
    num_skipped: int
    num_failed: int
    scores: Mapping[str, float]
    baselines: Mapping[str, Mapping[str, float]]
    signatures: Mapping[str, str]
    wall_s: float
    created: str

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints and the store keeps."""
        return asdict(self)

    def rows(self) -> tuple[list[str], list[list[str]]]:
        """Return the table: a line per kind, a column per metric, the baselines in brackets."""
        metrics = [name for name in self.scores if "/" not in name]
        kinds = list(dict.fromkeys(name.split("/", 1)[1] for name in self.scores if "/" in name))
        lines = [["all", *(self._cell(metric) for metric in metrics)]]
        lines += [[kind, *(self._cell(f"{metric}/{kind}") for metric in metrics)] for kind in kinds]
        return ["kind", *metrics], lines

    def _cell(self, name: str) -> str:
        if name not in self.scores:
            return ""
        beside = [f"{found[name]:.3f}" for found in self.baselines.values() if name in found]
        return f"{self.scores[name]:.3f}" + (f" ({', '.join(beside)})" if beside else "")


@dataclass(frozen=True, slots=True)
class PieceAnswers:
    """The answers to one piece.

    Attributes:
        answers: In the order of the rows; empty where the model failed.
        examples: What they belong to, without bytes.
        num_failed: Examples that the model could not answer.
        num_skipped: Rows that could not be used.
        error: Why the piece could not be read, instead of all the rest.
    """

    answers: Sequence[Answer] = ()
    examples: Sequence[Example] = ()
    num_failed: int = 0
    num_skipped: int = 0
    error: DataError | None = None


@dataclass(frozen=True)
class PieceAnswerer:
    """Answers the examples of one split in a piece; made once in each worker.

    Attributes:
        load: Loads the model.
        reader: Turns rows into examples.
        split: Which of them.
    """

    load: LoadEngine
    reader: ExampleReader
    split: Split

    def __call__(self) -> Callable[[tuple[int, Piece]], tuple[int, PieceAnswers]]:
        """Load the model; return what answers a piece, which has a number."""
        engine = self.load()
        return lambda piece: (piece[0], self._answer(engine, piece[1]))

    def _answer(self, engine: Engine, piece: Piece) -> PieceAnswers:
        skipped = SkippedRows()
        answers: list[Answer | ItemError] = []
        examples: list[Example] = []
        try:
            found = (example for _, split, example in self.reader.read(piece, skipped) if split == self.split)
            while items := list(islice(found, EXAMPLES_PER_CALL)):
                answers += engine.answer(items)
                examples += map(_without_bytes, items)
        except DataError as error:
            return PieceAnswers(error=error)
        plain: list[Answer] = [{} if isinstance(answer, ItemError) else answer for answer in answers]
        return PieceAnswers(plain, examples, len([answer for answer in plain if not answer]), skipped.count)


def evaluate(
    config: RunConfig, ref: str, load: LoadEngine, run_items: RunItems, *, split: Split = "test"
) -> EvaluateReport:
    """Score a model on one split of the data of a file.

    Args:
        config: The file: its `data` and its task.
        ref: Full reference of the version.
        load: Loads it.
        run_items: Runs the work.
        split: Which examples.

    Raises:
        DataError: The split is empty, or a row cannot be used.
    """
    started = time.monotonic()
    task, source = load_task(config), open_source(config.data)
    reader = ExampleReader(config.data, task.columns, task.input_columns, split_shares(config.data))
    pieces = [piece for piece in source.pieces if piece.split in (None, split)]
    found = dict(run_items(PieceAnswerer(load, reader, split), list(enumerate(pieces))))
    results = [found[number] for number in sorted(found)]
    for result in results:
        if result.error is not None:
            raise result.error
    answers = [answer for result in results for answer in result.answers]
    examples = [example for result in results for example in result.examples]
    if not examples:
        raise DataError(
            f"{source.description} holds no {split} example", f"set data.{split} or data.{split}_split"
        )
    return EvaluateReport(
        ref=ref,
        split=split,
        source=source.description,
        num_examples=len(examples),
        num_skipped=sum(result.num_skipped for result in results),
        num_failed=sum(result.num_failed for result in results),
        scores=task.score(answers, examples),
        baselines=baselines(task, _training(source, reader), examples),
        signatures=task.score_signatures(),
        wall_s=round(time.monotonic() - started, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def keep_report(store: ObjectStore, report: EvaluateReport) -> str:
    """Write a report into the store next to the run; return its key."""
    name, _, version = report.ref.partition("@")
    stamp = "".join(filter(str.isalnum, report.created.removesuffix("+00:00")))
    key = f"runs/{name}/{version.split('-')[0]}/evaluations/{version}-{report.split}-{stamp}.json"
    store.put(key, json.dumps(report.as_json(), indent=1).encode())
    return key


def _training(source: Source, reader: ExampleReader) -> Iterator[Example]:
    skipped = SkippedRows()
    for piece in source.pieces:
        for _, split, example in reader.read(piece, skipped) if piece.split in (None, "train") else ():
            if split == "train":
                yield example


def _without_bytes(example: Example) -> Example:
    return {name: value for name, value in example.items() if not isinstance(value, bytes)}
