from __future__ import annotations

import json
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyarrow import parquet

from eagleray.config.schema import DataConfig, ParallelText
from eagleray.errors import DataError
from eagleray_jobs.data import files as files_module
from eagleray_jobs.data.examples import ExampleReader, SkippedRows
from eagleray_jobs.data.files import InputFile, find_files, index_lines
from eagleray_jobs.data.rows import Row
from eagleray_jobs.data.sources import open_source, split_shares

TRANSLATION = (("source", "target"), ("source",))
CLASSIFICATION = (("text", "label"), ("text",))
Write = Callable[[str, bytes], str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, data: bytes) -> str:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        return str(path)

    return write


def rows_of(data: DataConfig) -> list[Row]:
    return list(chain.from_iterable(piece.rows() for piece in open_source(data).pieces))


def read(data: DataConfig, columns: Any = CLASSIFICATION) -> tuple[list[tuple[str, dict[str, Any]]], SkippedRows]:
    reader, skipped = ExampleReader(data, *columns, split_shares(data)), SkippedRows()
    found = chain.from_iterable(reader.read(piece, skipped) for piece in open_source(data).pieces)
    return [(split, example) for _, split, example in found], skipped


def texts(data: DataConfig, column: str = "text", columns: Any = CLASSIFICATION) -> list[str]:
    return [example[column] for _, example in read(data, columns)[0]]


ROWS = [
    {"text": "one, two", "label": "a"},
    {"text": 'a "quoted" word', "label": "b"},
    {"text": "été\n№", "label": "a"},
]


def test_every_format_gives_the_same_rows(write: Write, tmp_path: Path) -> None:
    write("a.jsonl", "\n".join(map(json.dumps, ROWS)).encode())
    write("a.csv", 'text,label\r\n"one, two",a\r\n"a ""quoted"" word",b\r\n"été\n№",a\r\n'.encode())
    parquet.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        assert [row.values for row in rows_of(DataConfig(train=str(tmp_path / f"a.{suffix}")))] == ROWS


def test_a_tsv_has_no_quotes(write: Write) -> None:
    path = write("a.tsv", b'text\tlabel\na "b\tx\n"\ty\n')
    assert [row.values for row in rows_of(DataConfig(train=path))] == [
        {"text": 'a "b', "label": "x"},
        {"text": '"', "label": "y"},
    ]


def test_a_byte_order_mark_belongs_to_no_column(write: Write) -> None:
    for name, data in (("a.csv", b"text,label\na,b\n"), ("a.jsonl", b'{"text": "a", "label": "b"}')):
        assert texts(DataConfig(train=write(name, b"\xef\xbb\xbf" + data))) == ["a"]


def test_parallel_text_pairs_the_lines_of_two_files(write: Write) -> None:
    text = ParallelText(source=write("a.en", b"one\r\ntwo\n"), target=write("a.fr", b"un\ndeux"))
    rows = rows_of(DataConfig(train=text))
    assert [row.values for row in rows] == [{"source": "one", "target": "un"}, {"source": "two", "target": "deux"}]


def test_parallel_text_of_different_length_is_refused(write: Write) -> None:
    text = ParallelText(source=write("a.en", b"one\ntwo\n"), target=write("a.fr", b"un\n"))
    with pytest.raises(DataError, match=r"a\.en has 2 lines and .*a\.fr 1"):
        open_source(DataConfig(train=text))


def test_large_files_are_cut_into_pieces_that_join_again(write: Write) -> None:
    num_rows = 2 * files_module.ROWS_PER_PIECE + 17
    quoted = b"text,label\n" + b"".join(b'"line\n%d",a\n' % i for i in range(num_rows))
    data = DataConfig(train=write("a.csv", quoted))
    source = open_source(data)
    assert len(source.pieces) == 3
    assert [row.values["text"] for row in rows_of(data) if row.values] == [f"line\n{i}" for i in range(num_rows)]
    last = list(source.pieces[-1].rows())[-1]
    assert last.where.endswith(f"a.csv:{2 * num_rows}")  # a row of two lines is named by its first


def test_row_groups_of_parquet_are_pieces(tmp_path: Path) -> None:
    table = pa.table({"text": [str(i) for i in range(100)], "label": ["a"] * 100})
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    data = DataConfig(train=str(tmp_path / "a.parquet"))
    assert len(open_source(data).pieces) == 3
    assert [row.where.rsplit(":")[-1] for row in rows_of(data)] == [str(i) for i in range(1, 101)]


def test_a_glob_takes_its_files_in_the_order_of_their_names(write: Write, tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.txt"):
        write(name, json.dumps({"text": name, "label": 1}).encode())
    assert texts(DataConfig(train=str(tmp_path / "*.jsonl"))) == ["a.jsonl", "b.jsonl"]


@pytest.mark.parametrize(
    "pattern, match",
    [("none.jsonl", "does not exist"), ("*.jsonl", "matches no file"), (".", "is a directory")],
)
def test_files_that_cannot_be_found_are_named(tmp_path: Path, pattern: str, match: str) -> None:
    with pytest.raises(DataError, match=match):
        find_files(str(tmp_path / pattern))


def test_a_file_named_twice_is_refused(write: Write, tmp_path: Path) -> None:
    path = write("a.jsonl", b"{}")
    with pytest.raises(DataError, match="named twice"):
        find_files([path, str(tmp_path / "*.jsonl")])


def test_an_unknown_suffix_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match=r"suffix '\.xml' is unknown"):
        open_source(DataConfig(train=write("a.xml", b"")))


def test_what_says_it_is_parquet_and_is_not_is_named(write: Write) -> None:
    with pytest.raises(DataError, match=r"a\.parquet is no Parquet file"):
        open_source(DataConfig(train=write("a.parquet", b"PAR1")))


BAD_LINES = [
    (b"", "is empty"),
    (b"{", "is not valid JSON"),
    (b"[1]", "an object was expected"),
    (b'{"text": "\xff", "label": 1}', "not valid UTF-8: byte 0xff at position 10"),
    (b'{"text": "\\ud800", "label": 1}', "lone surrogate"),
    (b'{"text": "x"}', "column 'label' is missing; the row has 'text'"),
    (b'{"text": "  ", "label": 1}', "column 'text' is empty"),
    (b'{"text": null, "label": 1}', "column 'text' is empty"),
    (b'{"text": 3, "label": 1}', "column 'text' must be text, found int 3"),
    (b'{"text": "x", "label": 1.5}', "column 'label' must be a word or a whole number"),
    (b'{"text": "x", "label": true}', "column 'label' must be a word or a whole number"),
]


@pytest.mark.parametrize("line, problem", BAD_LINES)
def test_a_bad_row_stops_with_its_file_line_and_content(write: Write, line: bytes, problem: str) -> None:
    path = write("a.jsonl", b'{"text": "good", "label": 1}\n' + line + b'\n{"text": "good too", "label": 2}\n')
    with pytest.raises(DataError) as raised:
        read(DataConfig(train=path))
    assert f"{path}:2: " in raised.value.message and problem in raised.value.message
    assert "\n  row: " in raised.value.message and "on_bad_row: skip" in (raised.value.hint or "")


@pytest.mark.parametrize("line, problem", BAD_LINES)
def test_a_bad_row_is_skipped_and_counted(write: Write, line: bytes, problem: str) -> None:
    path = write("a.jsonl", b'{"text": "good", "label": 1}\n' + line + b'\n{"text": "good too", "label": 2}\n')
    found, skipped = read(DataConfig(train=path, on_bad_row="skip"))
    assert [example["text"] for _, example in found] == ["good", "good too"]
    assert skipped.count == 1 and problem in skipped.shown[0]


@pytest.mark.parametrize(
    "row, problem",
    [
        (b"a,b,c", "has 3 columns, the header has 2"),
        (b"", "is empty"),
        (b"\xff,b", "is not valid UTF-8"),
        (b'"a"b,c', "is no valid row"),
    ],
)
def test_a_bad_row_of_a_csv_is_found_and_the_rest_is_read(write: Write, row: bytes, problem: str) -> None:
    path = write("a.csv", b"text,label\ngood,1\n" + row + b"\ngood too,2\n")
    rows = rows_of(DataConfig(train=path))
    assert [row.values and row.values["text"] for row in rows] == ["good", None, "good too"]
    assert rows[1].where.endswith("a.csv:3") and problem in (rows[1].problem or "")


def test_a_quote_that_never_ends_is_one_bad_row(write: Write) -> None:
    rows = rows_of(DataConfig(train=write("a.csv", b'text,label\na,b\n"c,d\ne,f\n')))
    assert [row.values is None for row in rows] == [False, True]
    assert rows[1].where.endswith(":3")


def test_invalid_utf8_in_parallel_text_names_the_line(write: Write) -> None:
    text = ParallelText(source=write("a.en", b"one\ntwo\n"), target=write("a.fr", b"un\nd\xe9ux\n"))
    with pytest.raises(DataError, match=r"a\.en:2: is not valid UTF-8: byte 0xe9 at position 1"):
        read(DataConfig(train=text), TRANSLATION)


def test_a_column_that_stands_twice_is_refused(write: Write) -> None:
    with pytest.raises(DataError, match="stands twice"):
        open_source(DataConfig(train=write("a.csv", b"text,text\na,b\n")))


def test_hugging_faces_translations_are_two_columns(write: Write) -> None:
    path = write("a.jsonl", json.dumps({"translation": {"en": "one", "fr": "un"}, "id": 3}).encode())
    found, _ = read(DataConfig(train=path), TRANSLATION)
    assert found[0][1] == {"source": "one", "target": "un", "key": "one"}


def test_a_language_that_a_translation_lacks_is_missing(write: Write) -> None:
    path = write("a.jsonl", json.dumps({"translation": {"en": "one", "de": "eins"}}).encode())
    with pytest.raises(DataError, match="'target' is missing"):
        read(DataConfig(train=path), TRANSLATION)


def test_columns_can_have_other_names(write: Write) -> None:
    path = write("a.csv", b"label,sentence,mood\nx,hello,good\n")
    found, _ = read(DataConfig(train=path, columns={"text": "sentence", "label": "mood"}))
    assert found[0][1] == {"text": "hello", "label": "good", "key": "hello"}


def test_a_mapped_column_that_is_missing_is_named(write: Write) -> None:
    path = write("a.csv", b"text,label\nhello,good\n")
    with pytest.raises(DataError, match=r"column 'mood' \(data.columns: label\) is missing"):
        read(DataConfig(train=path, columns={"label": "mood"}))


def test_rows_of_one_key_stay_in_one_split(write: Write) -> None:
    rows = [{"text": f"{i}", "label": 1, "user": i % 50} for i in range(1000)]
    path = write("a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    data = DataConfig(train=path, split_key="user", validation_split=0.2, test_split=0.2)
    splits: dict[str, set[str]] = {"train": set(), "validation": set(), "test": set()}
    for split, example in read(data)[0]:
        splits[split].add(example["key"])
    assert all(splits.values()) and sum(map(len, splits.values())) == 50


def test_a_file_for_a_split_takes_nothing_from_the_training_rows(write: Write) -> None:
    rows = [b'{"text": "%d", "label": 1}\n' % i for i in range(200)]
    files = {"train": write("a.jsonl", b"".join(rows)), "validation": write("b.jsonl", b"".join(rows[:30]))}
    counts = [split for split, _ in read(DataConfig(**files, test_split=0.1))[0]]
    assert counts.count("validation") == 30
    assert 0 < counts.count("test") < 60 and counts.count("train") == 200 - counts.count("test")


def test_the_path_of_an_image_is_relative_to_the_file_that_names_it(write: Write, tmp_path: Path) -> None:
    path = write("sub/a.csv", b"image,label\npictures/1.png,cat\n/elsewhere/2.png,dog\n")
    assert texts(DataConfig(train=path), "image", (("image", "label"), ("image",))) == [
        str(tmp_path / "sub/pictures/1.png"), "/elsewhere/2.png",
    ]  # fmt: skip


def test_a_file_that_shrinks_while_it_is_read_is_noticed(write: Write) -> None:
    path = write("a.jsonl", b'{"text": "x", "label": 1}\n')
    source = open_source(DataConfig(train=path))
    Path(path).write_bytes(b"{")
    with pytest.raises(DataError, match="became shorter"):
        list(source.pieces[0].rows())


def test_the_content_decides_what_a_source_is_and_not_its_place(write: Write) -> None:
    contents = [
        open_source(DataConfig(train=write(name, data))).content
        for name, data in (("a.jsonl", b"{}"), ("sub/b.jsonl", b"{}"), ("c.jsonl", b"[]"))
    ]
    assert contents[0] == contents[1] != contents[2]


def test_an_empty_file_has_no_rows(write: Write) -> None:
    path = write("a.jsonl", b"")
    assert index_lines(InputFile(path, 0)).spans == () and rows_of(DataConfig(train=path)) == []
