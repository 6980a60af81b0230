from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from eagleray.errors import DataError
from eagleray_jobs.data.arrow import ArrowFile, write_rows

ROWS: list[dict[str, Any]] = [
    {
        "ids": [1, 2, 65535],
        "small": 3,
        "big": 2**40,
        "real": 0.5,
        "text": "été",
        "image": b"\x00\xff",
        "empty": [],
    },
    {"ids": [], "small": 0, "big": -1, "real": -1.25, "text": "", "image": b"", "empty": []},
    {"ids": [7], "small": 1, "big": 5, "real": 3.0, "text": "x", "image": b"y", "empty": []},
]


def written(tmp_path: Path, rows: list[dict[str, Any]], examples: list[dict[str, Any]] | None = None) -> ArrowFile:
    path = tmp_path / "rows.arrow"
    path.write_bytes(write_rows(rows, [1] * len(rows), examples or [{}] * len(rows)))
    return ArrowFile(path)


def test_features_come_back_with_their_types(tmp_path: Path) -> None:
    file = written(tmp_path, ROWS)
    for i, row in enumerate(ROWS):
        found = file.features(i)
        assert found == row
        assert {name: type(value) for name, value in found.items()} == {n: type(v) for n, v in row.items()}


@pytest.mark.parametrize("number", [-1, 65536, -(2**31), 2**31, 2**62])
def test_numbers_of_any_size_come_back(tmp_path: Path, number: int) -> None:
    rows = [{"ids": [number, 0], "one": number}]
    assert written(tmp_path, rows).features(0) == rows[0]


def test_token_ids_take_two_bytes_each(tmp_path: Path) -> None:
    rows = [{"ids": list(range(1000))} for _ in range(100)]
    assert len(write_rows(rows, [1] * 100, [{}] * 100)) < 2.2 * 100 * 1000


def test_an_example_comes_back_without_its_image(tmp_path: Path) -> None:
    file = written(tmp_path, ROWS[:1], [{"image": b"large", "label": "a", "kind": "k", "key": "1"}])
    assert file.example(0) == {"label": "a", "kind": "k", "key": "1"}


@pytest.mark.parametrize("data", [b"", b"ARROW1", b"\x00" * 100])
def test_what_is_no_prepared_file_is_named(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "x.arrow").write_bytes(data)
    with pytest.raises(DataError, match=r"x\.arrow is no prepared data"):
        ArrowFile(tmp_path / "x.arrow")
