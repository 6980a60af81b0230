from __future__ import annotations

import json
import pickle
from collections.abc import Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from eagleray.config.schema import RunConfig
from eagleray.errors import DataError
from eagleray.store.objects import ObjectStore
from eagleray.store.sweep import sweep
from eagleray.tasks import load_task
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.data.manifest import manifest_key
from eagleray_jobs.data.prepare import EncodePiece, PieceResult, prepare, run_in_line
from eagleray_jobs.data.rows import Piece
from eagleray_jobs.data.split import SPLITS


class CountingRunner:
    """Runs pieces in line, counts how often, and may do something before the first result."""

    def __init__(self, before: Any = None) -> None:
        self.num_runs = 0
        self.before = before

    def __call__(self, encode: EncodePiece, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
        self.num_runs += 1
        if self.before is not None:
            self.before()
        return run_in_line(pickle.loads(pickle.dumps(encode)), pieces)


@pytest.fixture
def store(tmp_path: Path) -> ObjectStore:
    return ObjectStore.open(str(tmp_path / "store"))


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    rows = [{"text": f"text number {i}", "label": ("good", "bad")[i % 2], "kind": f"k{i % 3}"} for i in range(300)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def config_of(path: Path, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "task": "text-classification",
            "model": {"family": "bert", "tokenizer": {"vocab_size": 300}},
            "data": {"train": str(path), **data},
        }
    )


def prepared(
    config: RunConfig, store: ObjectStore, run_pieces: Any = run_in_line, notes: Any = None
) -> PreparedData:
    return prepare(config, load_task(config), store, run_pieces, (notes if notes is not None else []).append)


def test_a_piece_that_runs_again_is_written_once(store: ObjectStore, rows_path: Path) -> None:
    def run_twice(encode: EncodePiece, pieces: Sequence[Piece]) -> Iterator[PieceResult]:
        assert list(run_in_line(encode, pieces)) == list(run_in_line(encode, pieces))
        return run_in_line(encode, pieces)

    data = prepared(config_of(rows_path), store, run_twice)
    assert sum(data.summary.num_rows.values()) == 300


def test_rows_come_back_as_the_task_encodes_them(store: ObjectStore, rows_path: Path) -> None:
    config = config_of(rows_path)
    data, task = prepared(config, store), load_task(config)
    processor = task.load_processor(data.processor_files)
    for split in SPLITS:
        rows = data.split(split)
        assert len(rows) == data.summary.num_rows[split] > 0
        for i in range(len(rows)):
            encoded = task.encode(rows.example(i), processor)
            assert rows[i] == encoded.features and rows.lengths[i] == encoded.length
            assert rows.example(i)["kind"] in ("k0", "k1", "k2")
    assert sum(data.summary.num_rows.values()) == 300


def test_the_order_of_the_rows_is_that_of_the_source(store: ObjectStore, rows_path: Path) -> None:
    rows = prepared(config_of(rows_path), store).split("train")
    numbers = [int(rows.example(i)["text"].split()[-1]) for i in range(len(rows))]
    assert numbers == sorted(numbers)


def test_the_same_data_is_prepared_once(store: ObjectStore, rows_path: Path, tmp_path: Path) -> None:
    runner, notes = CountingRunner(), []
    first = prepared(config_of(rows_path), store, runner)
    other_place = tmp_path / "elsewhere.jsonl"
    other_place.write_bytes(rows_path.read_bytes())
    again = prepared(config_of(other_place), store, runner, notes)
    assert runner.num_runs == 1 and again.fingerprint == first.fingerprint
    assert "prepared before" in notes[0]


@pytest.mark.parametrize("change", ["rows", "data", "tokenizer", "task"])
def test_what_decides_the_rows_decides_the_fingerprint(store: ObjectStore, rows_path: Path, change: str) -> None:
    config = config_of(rows_path)
    first = prepared(config, store).fingerprint
    if change == "rows":
        rows_path.write_text(rows_path.read_text().replace("number 7", "number seven"))
    elif change == "data":
        config = config_of(rows_path, max_source_length=9)
    elif change == "tokenizer":
        model = config.model.model_copy(
            update={"tokenizer": config.model.tokenizer.model_copy(update={"vocab_size": 310})}
        )
        config = config.model_copy(update={"model": model})
    else:
        config = config_of(rows_path, labels=["bad", "good"])
    assert prepared(config, store).fingerprint != first


def test_what_does_not_decide_the_rows_is_no_part_of_the_fingerprint(store: ObjectStore, rows_path: Path) -> None:
    config = config_of(rows_path)
    runner = CountingRunner()
    prepared(config, store, runner)
    prepared(config.model_copy(update={"name": "other", "store": "/elsewhere"}), store, runner)
    assert runner.num_runs == 1


def test_of_two_preparations_at_once_both_use_what_the_first_one_wrote(
    store: ObjectStore, rows_path: Path
) -> None:
    config = config_of(rows_path)
    winners: list[PreparedData] = []
    loser = prepared(config, store, CountingRunner(before=lambda: winners.append(prepared(config, store))))
    assert loser.manifest == winners[0].manifest
    assert [loser.split("train")[i] for i in range(5)] == [winners[0].split("train")[i] for i in range(5)]


def test_a_preparation_that_died_leaves_nothing_that_counts(store: ObjectStore, rows_path: Path) -> None:
    def die() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepared(config_of(rows_path), store, CountingRunner(before=die))
    assert not [info.key for info in store.list("data") if info.key.endswith("manifest.json")]
    assert prepared(config_of(rows_path), store).summary.num_rows["train"] > 0


def test_truncation_is_counted_and_shown(store: ObjectStore, rows_path: Path) -> None:
    notes: list[str] = []
    data = prepared(config_of(rows_path, max_source_length=4), store, notes=notes)
    assert sum(data.summary.num_truncated.values()) == 300
    assert any("300 of 300 rows are longer than data.max_source_length" in note for note in notes)
    assert data.split("train").lengths.max() == 4


@pytest.mark.parametrize("line", ['{"text": "x"}', '{"text": "x", "label": "unknown"}'])
def test_a_row_that_the_task_refuses_stops_with_its_place(store: ObjectStore, rows_path: Path, line: str) -> None:
    rows_path.write_text(rows_path.read_text() + "\n" + line)
    with pytest.raises(DataError, match=r"rows\.jsonl:301: .*label"):
        prepared(config_of(rows_path, labels=["bad", "good"], validation_split=0, test_split=0), store)


def test_rows_that_cannot_be_used_are_skipped_counted_and_shown(store: ObjectStore, rows_path: Path) -> None:
    rows_path.write_text(rows_path.read_text() + '\n{"text": "x"}\n\n{"text": "x", "label": "unknown"}')
    notes: list[str] = []
    data = prepared(config_of(rows_path, labels=["bad", "good"], on_bad_row="skip"), store, notes=notes)
    assert data.summary.num_skipped == 3 and sum(data.summary.num_rows.values()) == 300
    assert any("3 rows could not be used" in note for note in notes)
    assert [f"rows.jsonl:{n}" in "\n".join(notes) for n in (301, 302, 303)] == [True] * 3


def test_a_source_without_a_usable_row_is_refused(store: ObjectStore, rows_path: Path) -> None:
    rows_path.write_text("{}\n{}\n")
    with pytest.raises(DataError, match="no row to train on; 2 could not be used"):
        prepared(config_of(rows_path, on_bad_row="skip"), store)


def test_a_damaged_file_is_refused(store: ObjectStore, rows_path: Path) -> None:
    data = prepared(config_of(rows_path), store)
    path = store.local_path(data.manifest.splits["train"][0].key)
    assert path is not None
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="missing or not"):
        data.split("train")


def test_a_processor_file_that_changed_is_refused(store: ObjectStore, rows_path: Path) -> None:
    data = prepared(config_of(rows_path), store)
    path = store.local_path(data.manifest.processor["tokenizer.json"].key)
    assert path is not None
    path.write_bytes(path.read_bytes().replace(b"[CLS]", b"[CLX]"))
    with pytest.raises(DataError, match=r"tokenizer\.json is damaged"):
        _ = data.processor_files


def test_data_that_was_never_prepared_is_named(store: ObjectStore) -> None:
    with pytest.raises(DataError, match="holds no prepared data 1234"):
        PreparedData(store, "1234")


def test_a_manifest_that_is_cut_is_refused(store: ObjectStore, rows_path: Path) -> None:
    data = prepared(config_of(rows_path), store)
    path = store.local_path(manifest_key(data.fingerprint))
    assert path is not None
    whole = path.read_bytes()
    for length in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged"):
            PreparedData(store, data.fingerprint)


class RemoteStore(ObjectStore):
    """A directory that has no path, like an object store."""

    num_reads = 0

    def local_path(self, key: str) -> Path | None:
        return None

    def get_range(self, key: str, start: int, end: int) -> bytes:
        self.num_reads += 1
        return super().get_range(key, start, end)


def test_an_object_store_is_copied_once_to_this_machine(rows_path: Path, tmp_path: Path) -> None:
    store = RemoteStore.open(str(tmp_path / "store"))
    config = config_of(rows_path)
    fingerprint = prepared(config, store).fingerprint
    data = PreparedData(store, fingerprint, cache_dir=tmp_path / "cache")
    first = [data.split("train")[i] for i in range(3)]
    num_reads = store.num_reads
    again = PreparedData(store, fingerprint, cache_dir=tmp_path / "cache").split("train")
    assert [again[i] for i in range(3)] == first and store.num_reads == num_reads > 0
    copies = list((tmp_path / "cache" / "data").glob("*.arrow"))
    assert [sha256(path.read_bytes()).hexdigest() == path.stem for path in copies] == [True]


def test_a_copy_that_is_not_what_was_written_is_refused(rows_path: Path, tmp_path: Path) -> None:
    store = RemoteStore.open(str(tmp_path / "store"))
    data = prepared(config_of(rows_path), store)
    path = tmp_path / "store" / data.manifest.splits["train"][0].key
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="is damaged"):
        PreparedData(store, data.fingerprint, cache_dir=tmp_path / "cache").split("train")
    assert not list((tmp_path / "cache" / "data").glob("*.arrow*"))


def test_the_sweep_removes_what_other_preparations_left(store: ObjectStore, rows_path: Path) -> None:
    data = prepared(config_of(rows_path), store)
    rows = list(data.split("train"))
    slower = f"data/{data.fingerprint}/slower/train-00000.arrow"
    dead, unreadable = "data/dead/attempt/train-00000.arrow", "data/unreadable/attempt/train-00000.arrow"
    for key in (slower, dead, unreadable):
        store.put(key, b"rows")
    store.put("data/unreadable/manifest.json", b"{")
    assert sweep(store) == []  # a preparation may be at work
    swept = sweep(store, grace_s=-5)
    assert {(item.key, item.size_bytes, item.reason) for item in swept} == {
        (slower, 4, "no manifest of prepared data names it"),
        (dead, 4, "no manifest of prepared data names it"),
    }
    assert store.exists(unreadable) and not store.exists(slower) and not store.exists(dead)
    assert list(PreparedData(store, data.fingerprint).split("train")) == rows


def test_the_user_code_decides_the_fingerprint(store: ObjectStore, rows_path: Path, tmp_path: Path) -> None:
    code = tmp_path / "code"
    code.mkdir()
    config = config_of(rows_path).model_copy(update={"code": (str(code),)})
    fingerprints = []
    for text in ("a = 1", "a = 2", "a = 1"):
        (code / "words.py").write_text(text)
        fingerprints.append(prepared(config, store).fingerprint)
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]


def test_a_row_outside_of_the_split_is_an_index_error(store: ObjectStore, rows_path: Path) -> None:
    rows = prepared(config_of(rows_path, validation_split=0), store)
    assert len(rows.split("validation")) == 0
    with pytest.raises(IndexError):
        rows.split("train")[len(rows.split("train"))]
