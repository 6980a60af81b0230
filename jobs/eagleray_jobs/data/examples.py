"""From the rows of a source to the examples of a task: columns, keys, and what is wrong with a row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

from eagleray.config.schema import DataConfig
from eagleray_jobs.data.rows import Piece, Row
from eagleray_jobs.data.split import Split, SplitShares

MAX_SHOWN_PROBLEMS = 5


@dataclass(slots=True)
class SkippedRows:
    """Rows that were left out under `data.on_bad_row: skip`: how many, and the first of them."""

    count: int = 0
    shown: list[str] = field(default_factory=list)

    def add(self, count: int, shown: Sequence[str]) -> None:
        """Count further ones."""
        self.count += count
        self.shown += shown[: MAX_SHOWN_PROBLEMS - len(self.shown)]


@dataclass(frozen=True, slots=True)
class ExampleReader:
    """Reads pieces as examples of a task.

    Attributes:
        data: The section of the file.
        columns: What every example must have.
        input_columns: What a key is made of where the file names no column for it.
        shares: Decides the split of a key.
    """

    data: DataConfig
    columns: tuple[str, ...]
    input_columns: tuple[str, ...]
    shares: SplitShares

    def read(self, piece: Piece, skipped: SkippedRows) -> Iterator[tuple[Row, Split, dict[str, Any]]]:
        """Yield the usable rows of a piece, each with its split and as an example.

        Raises:
            DataError: A row cannot be used, and `data.on_bad_row` is `stop`.
        """
        for row in piece.rows():
            example, problem = self.example(row, piece.folder)
            if problem is None:
                example["key"] = key = self._key(row.values or {}, example)
                yield row, piece.split or self.shares.of(key), example
            else:
                self.refuse(row, problem, skipped)

    def example(self, row: Row, folder: str | None = None) -> tuple[dict[str, Any], str | None]:
        """Return a row as an example, and why it cannot be used (None: it can)."""
        example = self._adapt(row.values or {}, folder)
        return example, row.problem or self._find_missing(row) or find_problem(example, self.columns)

    def refuse(self, row: Row, problem: str, skipped: SkippedRows) -> None:
        """Stop at a row, or count it as skipped.

        Raises:
            DataError: `data.on_bad_row` is `stop`.
        """
        if self.data.on_bad_row == "stop":
            raise row.error(problem)
        skipped.add(1, [f"{row.where}: {problem}"])

    def _adapt(self, values: Mapping[str, Any], folder: str | None) -> dict[str, Any]:
        """Return the columns under the task's names."""
        example = _flatten_translation(values, self.data) if "source" in self.columns else dict(values)
        mapped = {own: values[theirs] for own, theirs in self.data.columns.items() if theirs in values}
        example = {name: value for name, value in example.items() if name not in self.data.columns} | mapped
        wanted = (*self.columns, *mapped, "kind", "key")
        example = {name: example[name] for name in dict.fromkeys(wanted) if name in example}
        if folder is not None and isinstance(example.get("image"), str) and "image" in self.columns:
            path = example["image"]
            example["image"] = path if path.startswith("/") or "://" in path else folder + path
        return example

    def _find_missing(self, row: Row) -> str | None:
        values = row.values or {}
        mapped = {own: theirs for own, theirs in self.data.columns.items() if own in self.columns}
        wanted = {theirs: f" (data.columns: {own})" for own, theirs in mapped.items()}
        if self.data.split_key is not None:
            wanted[self.data.split_key] = " (data.split_key)"
        for column, why in wanted.items():
            if column not in values:
                return f"column {column!r}{why} is missing; the row has {_names(values)}"
        return None

    def _key(self, values: Mapping[str, Any], example: Mapping[str, Any]) -> str:
        if self.data.split_key is not None:
            return str(values[self.data.split_key])
        if self.data.source is not None:
            return str(example["key"])
        return " ".join(_key_part(example[column]) for column in self.input_columns)


def find_problem(values: Mapping[str, Any], columns: Sequence[str]) -> str | None:
    """Return why a row cannot be used, or None: a column is missing, empty or of the wrong type."""
    for column in columns:
        if column not in values:
            return f"column {column!r} is missing; the row has {_names(values)}"
        value = values[column]
        if value is None or (isinstance(value, str | bytes) and not value.strip()):
            return f"column {column!r} is empty"
        if column in CHECKS and not CHECKS[column][0](value):
            return f"column {column!r} must be {CHECKS[column][1]}, found {type(value).__name__} {value!r:.80}"
        if isinstance(value, str) and (problem := _find_text_problem(value)):
            return f"column {column!r} {problem}"
    return None


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _is_label(value: object) -> bool:
    if isinstance(value, float):
        return value.is_integer()
    return isinstance(value, str | int) and not isinstance(value, bool)


def _is_image(value: object) -> bool:
    return isinstance(value, str | bytes | list | Mapping)


CHECKS: Mapping[str, tuple[Callable[[object], bool], str]] = {
    "source": (_is_text, "text"),
    "target": (_is_text, "text"),
    "text": (_is_text, "text"),
    "label": (_is_label, "a word or a whole number"),
    "image": (_is_image, "a path or the bytes of an image"),
}
"""What the columns of the built-in tasks may hold. The tasks look again; this is what the tokenizer is spared."""


def _find_text_problem(text: str) -> str | None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"is not valid Unicode: a lone surrogate at character {error.start}"
    return None


def _flatten_translation(values: Mapping[str, Any], data: DataConfig) -> dict[str, Any]:
    """Take Hugging Face's `{"translation": {"en": ..., "fr": ...}}` as two columns."""
    pair = values.get("translation")
    if not isinstance(pair, Mapping):
        return dict(values)
    sides = {"source": data.source_lang, "target": data.target_lang}
    flat = {column: pair[language] for column, language in sides.items() if language in pair}
    return {name: value for name, value in values.items() if name != "translation"} | flat


def _key_part(value: object) -> str:
    if isinstance(value, str):
        return value
    return sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


def _names(values: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, values)) or "no columns"
