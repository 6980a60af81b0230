"""Rows as they come from a source, and whether a task can use them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eagleray.errors import DataError
from eagleray_jobs.data.split import Split

MAX_SHOWN_CHARACTERS = 300


@dataclass(frozen=True, slots=True)
class Row:
    """One row of a source.

    Attributes:
        where: File and line, for messages: `train.jsonl:17`.
        values: The columns; None where the row could not even be read.
        problem: Why it could not be read.
        raw: What stood there, for messages; the columns say it where it is None.
    """

    where: str
    values: Mapping[str, Any] | None
    problem: str | None = None
    raw: str | None = None

    def error(self, problem: str) -> DataError:
        """Return the error that names the place, the problem and the row."""
        shown = self.raw if self.raw is not None else repr(self.values)
        if len(shown) > MAX_SHOWN_CHARACTERS:
            shown = f"{shown[:MAX_SHOWN_CHARACTERS]}... ({len(shown)} characters)"
        return DataError(
            f"{self.where}: {problem}\n  row: {shown}",
            "mend the row, or set data.on_bad_row: skip to leave such rows out and count them",
        )


class Piece(Protocol):
    """A part of a source that one worker reads: picklable, and read again as often as needed."""

    @property
    def split(self) -> Split | None:
        """The split of all its rows; None: the key of each row decides."""

    @property
    def folder(self) -> str | None:
        """Where paths in the rows begin, with the closing slash; None: there are no paths."""

    def rows(self) -> Iterator[Row]:
        """Read the rows, in their order."""


@dataclass(frozen=True, slots=True)
class Source:
    """Everything that is to be prepared.

    Attributes:
        pieces: Parts of about equal size, in the order of the rows.
        content: SHA-256 of the content, for the fingerprint.
        description: What it is, for reports and model cards.
    """

    pieces: Sequence[Piece]
    content: str
    description: str


@dataclass(frozen=True, slots=True)
class ListPiece:
    """Rows that lie in memory: a part of a bundled source."""

    name: str
    first: int
    values: tuple[Mapping[str, Any], ...]
    split: Split | None = None
    folder: str | None = None

    def rows(self) -> Iterator[Row]:
        """Read the rows."""
        for number, values in enumerate(self.values, self.first):
            yield Row(f"{self.name}:{number}", values)
