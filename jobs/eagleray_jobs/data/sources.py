"""What `data:` of the file names, as pieces of rows: bundled sources and the user's files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from eagleray.config.schema import DataConfig
from eagleray.errors import DataError
from eagleray_jobs.data.rows import ListPiece, Source
from eagleray_jobs.data.split import SplitShares

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
    raise DataError("files are not read yet")


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


def _bundled(name: str, rows: Sequence[Mapping[str, Any]]) -> Source:
    digest = sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=bytes.hex).encode() + b"\n")
    pieces = [
        ListPiece(name, start, tuple(rows[start : start + ROWS_PER_PIECE]))
        for start in range(0, len(rows), ROWS_PER_PIECE)
    ]
    return Source(pieces=pieces, content=digest.hexdigest(), description=name)
