"""What `data:` of the file names, as pieces of rows: bundled sources and the user's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from eagleray.config.schema import DataConfig, Files, ParallelText
from eagleray.errors import DataError
from eagleray_jobs.data.files import InputFile, find_files, format_of, hash_content, index_lines
from eagleray_jobs.data.readers import (
    DelimitedPiece,
    JsonLinesPiece,
    ParallelPiece,
    ParquetPiece,
    open_parquet,
    read_header,
)
from eagleray_jobs.data.rows import ListPiece, Piece, Source
from eagleray_jobs.data.split import Split, SplitShares

ROWS_PER_PIECE = 4_000
FEWEST_NAMES = 100
"""Territories that CLDR must name in a language: below it the language is hardly covered."""


def open_source(data: DataConfig) -> Source:
    """Open the source of a file: find its pieces and what it contains.

    Raises:
        DataError: A file is missing or of an unknown kind, or a language is unknown.
        UsageError: The source needs an extra that is not installed.
    """
    if data.source == "cldr-en-fr":
        return _bundled(data.source, _translation_rows(data))
    if data.source == "cldr-langid":
        return _bundled(data.source, _language_rows(data))
    if data.source == "digits":
        from eagleray_jobs.data.digits import digit_examples

        return _bundled(data.source, digit_examples())
    return _files(data)


def split_shares(data: DataConfig) -> SplitShares:
    """Return how much of the keys is held out where no file gives the split."""
    return SplitShares(
        validation=0.0 if data.validation is not None else data.validation_split,
        test=0.0 if data.test is not None else data.test_split,
    )


def _translation_rows(data: DataConfig) -> list[dict[str, str]]:
    from eagleray_jobs.data.cldr import translation_examples

    _check_languages([data.source_lang, data.target_lang])
    return translation_examples(data.source_lang, data.target_lang, split_shares(data))


def _language_rows(data: DataConfig) -> list[dict[str, str]]:
    from eagleray_jobs.data.cldr import LANGUAGES, language_examples

    languages = data.languages or LANGUAGES
    _check_languages(languages)
    return language_examples(languages, split_shares(data))


def _check_languages(languages: Sequence[str]) -> None:
    from babel import Locale
    from babel.localedata import exists

    if unknown := [language for language in languages if not exists(language)]:
        raise DataError(
            f"CLDR does not know the language {', '.join(map(repr, unknown))}",
            "use CLDR codes, for example en, fr, de, pt_PT",
        )
    if twice := {language for language in languages if list(languages).count(language) > 1}:
        raise DataError(f"a language is named twice: {', '.join(sorted(twice))}", "name each language once")
    for language in languages:
        if (num_names := len(Locale.parse(language).territories)) < FEWEST_NAMES:
            raise DataError(
                f"CLDR knows only {num_names} names of territories in {language!r}; {FEWEST_NAMES} are needed",
                "leave this language out",
            )


def _files(data: DataConfig) -> Source:
    pieces: list[Piece] = []
    contents: list[tuple[str | None, str]] = []
    described: list[str] = []
    parts: tuple[tuple[Files | None, Split | None], ...] = (
        (data.train, None), (data.validation, "validation"), (data.test, "test"),
    )  # fmt: skip
    for files, split in parts:
        if files is not None:
            found = _parallel_text(files, split) if isinstance(files, ParallelText) else _tables(files, split)
            pieces += found.pieces
            contents.append((split, found.content))
            described.append(found.description)
    digest = sha256(json.dumps(contents).encode()).hexdigest()
    return Source(pieces=pieces, content=digest, description="; ".join(described))


def _tables(patterns: str | list[str], split: Split | None) -> Source:
    pieces: list[Piece] = []
    digest = sha256()
    files = find_files(patterns)
    for file in files:
        found, content = _pieces_of(file, split)
        pieces += found
        digest.update(f"{format_of(file)} {content}\n".encode())
    return Source(pieces, digest.hexdigest(), ", ".join(file.uri for file in files))


def _pieces_of(file: InputFile, split: Split | None) -> tuple[list[Piece], str]:
    """Cut a file into pieces; return them and the SHA-256 of its content."""
    kind = format_of(file)
    if kind == "parquet":
        return _row_groups(file, split), hash_content(file)
    index = index_lines(file, quoted=kind == "csv")
    if kind == "jsonl":
        return [JsonLinesPiece(file, span, split) for span in index.spans], index.sha256
    delimiter = "\t" if kind == "tsv" else ","
    header = read_header(file, index.spans[0], delimiter) if index.spans else ()
    return [DelimitedPiece(file, span, split, header, delimiter) for span in index.spans], index.sha256


def _row_groups(file: InputFile, split: Split | None) -> list[Piece]:
    pieces: list[Piece] = []
    metadata = open_parquet(file).metadata
    first_row = 1
    for number in range(metadata.num_row_groups):
        pieces.append(ParquetPiece(file, number, first_row, split))
        first_row += metadata.row_group(number).num_rows
    return pieces


def _parallel_text(text: ParallelText, split: Split | None) -> Source:
    """Pair the lines of two languages.

    Raises:
        DataError: The numbers of files or of lines differ.
    """
    sources, targets = find_files(text.source), find_files(text.target)
    if len(sources) != len(targets):
        raise DataError(f"{len(sources)} source files and {len(targets)} target files", "give them in pairs")
    pieces: list[Piece] = []
    digest = sha256()
    for source, target in zip(sources, targets, strict=True):
        left, right = index_lines(source), index_lines(target)
        if left.num_rows != right.num_rows:
            raise DataError(
                f"{source.uri} has {left.num_rows} lines and {target.uri} {right.num_rows}",
                "line n of one must be the translation of line n of the other",
            )
        pieces += [
            ParallelPiece(source, left_span, target, right_span, split)
            for left_span, right_span in zip(left.spans, right.spans, strict=True)
        ]
        digest.update(f"text {left.sha256} {right.sha256}\n".encode())
    return Source(pieces, digest.hexdigest(), ", ".join(file.uri for file in (*sources, *targets)))


def _bundled(name: str, rows: Sequence[Mapping[str, Any]]) -> Source:
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=bytes.hex).encode() + b"\n")
    pieces = [
        ListPiece(name, start, tuple(rows[start : start + ROWS_PER_PIECE]))
        for start in range(0, len(rows), ROWS_PER_PIECE)
    ]
    return Source(pieces=pieces, content=digest.hexdigest(), description=name)
