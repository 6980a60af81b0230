"""Reading YAML: types of plain scalars, lines, and everything that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eagleray.config.document import MAX_FILE_BYTES, DocumentError, parse, read_bounded, resolve_plain


@pytest.mark.parametrize(
    "text, value",
    [
        ("2e-3", 0.002),
        ("1e5", 100000.0),
        ("+1.5", 1.5),
        (".5", 0.5),
        ("5.", 5.0),
        ("12", 12),
        ("-3", -3),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        # What YAML 1.1 would make of these is a trap: booleans, base 60, a date, underscores.
        ("no", "no"),
        ("on", "on"),
        ("yes", "yes"),
        ("12:30", "12:30"),
        ("2026-01-01", "2026-01-01"),
        ("1_000", "1_000"),
        ("=", "="),
        ("1" * 5000, "1" * 5000),
    ],
)
def test_a_plain_scalar_has_its_type_of_yaml_1_2(text: str, value: Any) -> None:
    found = resolve_plain(text)
    assert found == value and type(found) is type(value)


def test_a_quoted_or_tagged_scalar_keeps_or_gets_its_type() -> None:
    assert parse('a: "12"\nb: !!str 12\nc: !!float 3\nd: ! 5').value == {"a": "12", "b": "12", "c": 3.0, "d": "5"}


def test_each_key_and_item_knows_its_line() -> None:
    document = parse("a: 1\nb:\n  c: [1,\n      2]\n")
    assert document.lines[("a",)] == 1
    assert document.lines[("b", "c")] == 3
    assert document.lines[("b", "c", 1)] == 4


def test_anchors_and_merge_keys_work_and_own_keys_win() -> None:
    text = "base: &base {x: 1, y: 2}\nown: {<<: *base, y: 3}\nboth: {<<: [*base, {z: 4, x: 9}]}\n"
    value = parse(text).value
    assert value["own"] == {"x": 1, "y": 3}
    assert value["both"] == {"x": 1, "y": 2, "z": 4}


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "text, line, message",
    [
        ("a: 1\nb: 2\na: 3\n", 3, "key a stands twice; first on line 1"),
        ("s:\n  k: 1\n  k: 2\n", 3, "key k stands twice; first on line 2"),
        (BOMB, 5, "holds more than 100000 values once its anchors are expanded"),
        ("a: &a [*a]\n", 1, "anchor *a contains itself"),
        ("a: *b\n", 1, "anchor *b is not defined"),
        ("a: !!python/object/apply:os.system [id]\n", 1, "tag !!python/object/apply:os.system is not accepted"),
        ("a: 1\nb: !env HOME\n", 2, "tag !env is not accepted"),
        ("a: !!set {x}\n", 1, "tag !!set is not accepted"),
        ("a: !!int x\n", 1, "'x' is not a !!int"),
        ("a: 1\n---\nb: 2\n", 2, "holds more than one YAML document"),
        ("? [a, b]\n: 1\n", 1, "a key must be a plain word"),
        ("a: {<<: 3}\n", 1, "<< must be followed by an anchored section"),
        ("[" * 100_000, 1, "is nested more than 32 levels deep"),
        (
            "a:\n\t- b\n",
            2,
            "malformed YAML: found character that cannot start any token; quote a value that begins with @ or `, "
            "and indent with spaces",
        ),
        ("a: [1, 2\nb: 3\n", 2, "malformed YAML: did not find expected ',' or ']'"),
    ],
)
def test_what_is_no_plain_document_is_refused_with_its_line(text: str, line: int, message: str) -> None:
    with pytest.raises(DocumentError) as caught:
        parse(text)
    assert (caught.value.line, caught.value.message) == (line, message)


def test_a_file_is_read_only_up_to_its_limit_and_as_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "file.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\n")
    assert read_bounded(path) == "a: 1\n"
    path.write_bytes(b"a: 1\nb: \xff\n")
    with pytest.raises(DocumentError, match="is not UTF-8: byte 0xff") as caught:
        read_bounded(path)
    assert caught.value.line == 2
    path.write_bytes(b"#" * (MAX_FILE_BYTES + 1))
    with pytest.raises(DocumentError, match="is larger than 1048576 bytes"):
        read_bounded(path)
    with pytest.raises(DocumentError, match="cannot be read: Is a directory"):
        read_bounded(tmp_path)
