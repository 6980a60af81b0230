from __future__ import annotations

from collections import Counter, defaultdict
from itertools import chain
from typing import Any

import pytest

from eagleray.config.schema import DataConfig
from eagleray.errors import DataError
from eagleray_jobs.data.examples import find_problem
from eagleray_jobs.data.sources import open_source, split_shares


def rows_of(**data: Any) -> list[dict[str, Any]]:
    source = open_source(DataConfig(**data))
    return [dict(row.values or {}) for row in chain.from_iterable(piece.rows() for piece in source.pieces)]


@pytest.fixture(scope="module")
def translation() -> list[dict[str, Any]]:
    return rows_of(source="cldr-en-fr")


@pytest.fixture(scope="module")
def languages() -> list[dict[str, Any]]:
    return rows_of(source="cldr-langid")


def test_the_translations_are_those_of_cldr(translation: list[dict[str, Any]]) -> None:
    answers = {row["source"]: row["target"] for row in translation}
    assert answers["South Africa"] == "Afrique du Sud"
    assert answers["3:05 PM"] == "15:05"
    assert answers["in 3 days"] == "dans 3 jours"


def test_there_is_enough_of_every_kind(translation: list[dict[str, Any]]) -> None:
    counts = Counter(row["kind"] for row in translation)
    assert set(counts) == {
        "date", "time", "unit", "amount", "number", "duration", "list",
        "territory", "language", "script", "currency",
    }  # fmt: skip
    assert 10_000 <= counts.total() <= 40_000
    assert min(counts["date"], counts["unit"], counts["list"]) >= 3000


def test_a_text_with_two_translations_is_dropped(translation: list[dict[str, Any]]) -> None:
    assert len({row["source"] for row in translation}) == len(translation)


def test_a_text_of_two_languages_is_dropped(languages: list[dict[str, Any]]) -> None:
    assert len({row["text"] for row in languages}) == len(languages)
    assert "Angola" not in {row["text"] for row in languages}


def test_at_least_ten_languages_are_balanced(languages: list[dict[str, Any]]) -> None:
    counts = Counter(row["label"] for row in languages)
    assert len(counts) >= 10
    assert max(counts.values()) < 1.5 * min(counts.values())


def test_a_held_out_name_is_in_no_list_of_any_split(translation: list[dict[str, Any]]) -> None:
    shares = split_shares(DataConfig(source="cldr-en-fr"))
    held_out = {f"{row['key']}" for row in translation if shares.of(row["key"]) != "train"}
    codes = {key.split(":")[1] for key in held_out if key.split(":")[0] in ("territory", "language")}
    members = set(chain.from_iterable(row["key"][5:].split() for row in translation if row["kind"] == "list"))
    assert codes and members and not codes & members


def test_a_held_out_day_is_held_out_in_every_format(translation: list[dict[str, Any]]) -> None:
    keys = defaultdict(set)
    for row in translation:
        if row["kind"] == "date":
            keys[row["key"]].add(row["source"])
    assert len(keys) == 366
    assert {"March 5", "Mar 5"} & keys["day:03-05"] and len(keys["day:03-05"]) > 10


def test_every_kind_has_held_out_keys(translation: list[dict[str, Any]]) -> None:
    shares = split_shares(DataConfig(source="cldr-en-fr"))
    kinds = {split: {row["kind"] for row in translation if shares.of(row["key"]) == split} for split in
             ("train", "validation", "test")}  # fmt: skip
    assert kinds["train"] == kinds["validation"] == kinds["test"]


def test_the_source_is_the_same_each_time() -> None:
    data = DataConfig(source="cldr-langid", languages=["en", "fr"])
    assert open_source(data).content == open_source(data).content


def test_other_languages_can_be_chosen() -> None:
    assert {row["label"] for row in rows_of(source="cldr-langid", languages=["ja", "sw", "de"])} == {
        "ja",
        "sw",
        "de",
    }


def test_another_pair_of_languages_can_be_chosen() -> None:
    answers = {row["source"]: row["target"] for row in rows_of(source="cldr-en-fr", target_lang="de")}
    assert answers["in 3 days"] == "in 3 Tagen"


@pytest.mark.parametrize(
    "languages, match", [(["en", "xx"], "'xx'"), (["en", "en"], "twice"), (["en", "wa"], "wa")]
)
def test_a_language_that_cannot_be_used_is_named(languages: list[str], match: str) -> None:
    with pytest.raises(DataError, match=match):
        open_source(DataConfig(source="cldr-langid", languages=languages))


def test_no_bundled_row_is_bad(translation: list[dict[str, Any]], languages: list[dict[str, Any]]) -> None:
    assert {find_problem(row, ("source", "target")) for row in translation} == {None}
    assert {find_problem(row, ("text", "label")) for row in languages} == {None}


def test_the_digits_are_images_of_ten_classes() -> None:
    rows = rows_of(source="digits")
    assert len(rows) == 1797 and all(row["image"].startswith(b"\x89PNG") for row in rows)
    assert set(Counter(row["label"] for row in rows)) == set("0123456789")
