from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from fake_checkpoint import tiny_checkpoint
from pyarrow import parquet

from eagleray.engine import load_engine
from eagleray.errors import DataError, UsageError
from eagleray.tasks import load_task
from eagleray_jobs import rowformats
from eagleray_jobs.pool import run_in_line
from eagleray_jobs.predict import PredictReport, predict

TEXTS = ["one hour", "January 5", "two hours and 30 minutes", "France", "What is it?"] * 3


FAST = {"max_new_tokens": 5}


class Predictor:
    """Predicts with a tiny model in this process, and counts the chunks that it answers."""

    def __init__(self, folder: Path, task: str = "translation") -> None:
        self.folder = folder
        self.checkpoint, _ = tiny_checkpoint(task)
        self.num_answered = 0
        self.dies_at: int | None = None
        self.reverses = False

    def __call__(self, name: str, output: str, ref: str | None = None, **options: Any) -> PredictReport:
        config = self.checkpoint.config()
        return predict(
            config,
            ref or self.checkpoint.ref,
            lambda: load_engine(self.checkpoint),
            self._run,
            load_task(config),
            str(self.folder / name),
            str(self.folder / output),
            options={**FAST, **options},
        )

    def _run(self, make: Callable[[], Callable[[Any], Any]], items: Sequence[Any]) -> Iterator[Any]:
        for result in run_in_line(make, items[::-1] if self.reverses else items):
            if self.num_answered == self.dies_at:
                raise KeyboardInterrupt
            self.num_answered += 1
            yield result

    def answers(self, texts: Sequence[str]) -> list[str]:
        engine = load_engine(self.checkpoint)
        return [engine.answer([{"source": text}], FAST)[0]["text"] for text in texts]  # type: ignore[index]


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rowformats, "ROWS_PER_CHUNK", 4)


@pytest.fixture
def predictor(tmp_path: Path, small_chunks: None) -> Predictor:
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return Predictor(tmp_path)


def test_text_is_answered_line_for_line(predictor: Predictor, tmp_path: Path) -> None:
    report = predictor("in.txt", "out.txt")
    assert (tmp_path / "out.txt").read_text().split("\n")[:-1] == [
        " ".join(text.split()) for text in predictor.answers(TEXTS)
    ]
    assert (report.num_rows, report.num_errors, report.num_resumed) == (15, 0, 0)


def test_every_format_keeps_the_rows_and_adds_the_answer(predictor: Predictor, tmp_path: Path) -> None:
    rows = [{"source": text, "id": i} for i, text in enumerate(TEXTS)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet", row_group_size=7)
    with (tmp_path / "in.csv").open("w") as file:
        writer = csv.DictWriter(file, ["source", "id"])
        writer.writeheader()
        writer.writerows(rows)
    expected = [
        (row["source"], str(row["id"]), text) for row, text in zip(rows, predictor.answers(TEXTS), strict=True)
    ]
    pairs = [
        ("in.jsonl", "out.parquet"),
        ("in.parquet", "out.csv"),
        ("in.csv", "out.csv"),
        ("in.csv", "out.jsonl"),
    ]
    for given, kept in pairs:
        predictor(given, kept)
        found = read_rows(tmp_path / kept)
        assert [(row["source"], str(row["id"]), row["translation"]) for row in found] == expected


def read_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().split("\n") if line]
    if path.suffix == ".csv":
        with path.open(newline="") as file:
            return list(csv.DictReader(file))
    return list(parquet.read_table(path).to_pylist())


def test_a_bad_line_is_reported_in_its_place(predictor: Predictor, tmp_path: Path) -> None:
    lines = [b'{"source": "one hour"}', b"{", b'{"text": "x"}', b'{"source": ""}', b'{"source": "France"}']
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines))
    report = predictor("in.jsonl", "out.jsonl")
    rows = read_rows(tmp_path / "out.jsonl")
    assert [row["error"] is None for row in rows] == [True, False, False, False, True]
    assert "not valid JSON" in rows[1]["error"] and rows[2]["text"] == "x"
    assert report.num_errors == 3 and "in.jsonl:2: " in report.errors[0]


def test_a_bad_line_of_text_leaves_an_empty_line(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b"France\n\xff\n\nFrance\n")
    report = predictor("in.txt", "out.txt")
    lines = (tmp_path / "out.txt").read_text().split("\n")
    assert lines[1:3] == ["", ""] and lines[0] == lines[3] != "" and len(lines) == 5
    assert report.num_errors == 2 and "in.txt:2: is not valid UTF-8" in report.errors[0]


@pytest.mark.parametrize("reverses", [False, True])
@pytest.mark.parametrize("dies_at", [0, 1, 2, 3])
def test_an_interrupted_run_goes_on_where_it_was(
    predictor: Predictor, tmp_path: Path, dies_at: int, reverses: bool
) -> None:
    predictor("in.txt", "whole.txt")
    predictor.num_answered, predictor.dies_at, predictor.reverses = 0, dies_at, reverses
    with pytest.raises(KeyboardInterrupt):
        predictor("in.txt", "out.txt")
    assert not (tmp_path / "out.txt").exists()
    predictor.num_answered, predictor.dies_at = 0, None
    report = predictor("in.txt", "out.txt")
    # Chunks of four rows; the last one, which comes first in reverse, has three.
    kept_rows = [3, 4, 4, 4] if reverses else [4, 4, 4, 3]
    assert predictor.num_answered == 4 - dies_at and report.num_resumed == sum(kept_rows[:dies_at])
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()
    assert not (tmp_path / "out.txt.parts").exists()


def test_chunks_that_come_in_another_order_are_written_in_theirs(predictor: Predictor, tmp_path: Path) -> None:
    predictor("in.txt", "whole.txt")
    predictor.reverses = True
    predictor("in.txt", "out.txt")
    assert (tmp_path / "out.txt").read_bytes() == (tmp_path / "whole.txt").read_bytes()


@pytest.mark.parametrize("change", ["input", "ref", "options"])
def test_parts_of_another_input_version_or_options_are_not_used(
    predictor: Predictor, tmp_path: Path, change: str
) -> None:
    predictor.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        predictor("in.txt", "out.txt")
    predictor.num_answered, predictor.dies_at = 0, None
    if change == "input":
        (tmp_path / "in.txt").write_text("\n".join(reversed(TEXTS)))
    ref = "translation@r9-step-00000009" if change == "ref" else None
    report = predictor("in.txt", "out.txt", ref, **({"num_beams": 2} if change == "options" else {}))
    assert predictor.num_answered == 4 and report.num_resumed == 0


def test_a_part_that_was_damaged_is_not_used(predictor: Predictor, tmp_path: Path) -> None:
    predictor.dies_at = 2
    with pytest.raises(KeyboardInterrupt):
        predictor("in.txt", "out.txt")
    predictor.dies_at = None
    part = next((tmp_path / "out.txt.parts").rglob("*.part"))
    part.write_bytes(b"something else\n")
    with pytest.raises(DataError, match=r"\.part is damaged"):
        predictor("in.txt", "out.txt")


def test_a_column_that_is_taken_is_refused(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("source,translation\nFrance,x\n")
    with pytest.raises(UsageError, match="has a column 'translation'"):
        predictor("in.csv", "out.csv")
    (tmp_path / "in.jsonl").write_text('{"source": "France", "translation": "x"}')
    predictor("in.jsonl", "out.jsonl")
    row = read_rows(tmp_path / "out.jsonl")[0]
    assert row["translation"] == "x" and "where the answer would go" in row["error"]


def test_labels_come_with_their_scores(tmp_path: Path, small_chunks: None) -> None:
    (tmp_path / "in.txt").write_text("one hour\nune heure\n")
    predictor = Predictor(tmp_path, "text-classification")
    predictor("in.txt", "out.jsonl")
    for row in read_rows(tmp_path / "out.jsonl"):
        assert row["score"] == row["scores"][row["prediction"]] and abs(sum(row["scores"].values()) - 1) < 1e-5


def test_rows_without_fixed_columns_are_written_to_no_table_of_text(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text('{"source": "France"}')
    with pytest.raises(UsageError, match="JSONL"):
        predictor("in.jsonl", "out.csv")


def test_an_empty_file_gives_an_empty_file(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("")
    assert predictor("in.txt", "out.txt").num_rows == 0
    assert (tmp_path / "out.txt").read_bytes() == b""


def test_a_directory_is_no_output(predictor: Predictor, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is a directory"):
        predictor("in.txt", ".")


def test_one_file_at_a_time(predictor: Predictor, tmp_path: Path) -> None:
    (tmp_path / "in2.txt").write_text("x")
    with pytest.raises(UsageError, match="names 2 files"):
        predictor("in*.txt", "out.txt")
