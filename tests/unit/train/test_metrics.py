"""metrics.jsonl holds each step once, whatever was killed when; sinks never end a run."""

from __future__ import annotations

import json
import logging
import math
import secrets
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from eagleray.store.objects import ObjectStore
from eagleray_jobs.train.metrics import (
    RECORDS_PER_SEGMENT,
    JsonlFile,
    JsonlSegments,
    MetricWriter,
    TensorBoardFiles,
    Throughput,
    read_records,
)
from eagleray_jobs.train.spec import MetricRecord

RECORD = MetricRecord(
    step=0,
    epoch=0.5,
    loss=1.25,
    learning_rate=0.1,
    grad_norm=2.0,
    examples_per_s=100.0,
    tokens_per_s=900.0,
    memory_bytes=12345,
)


def record(step: int) -> MetricRecord:
    return replace(RECORD, step=step)


def steps_of(text: bytes) -> list[int]:
    return [entry["step"] for entry in read_records(text)]


class Memory:
    """A sink that keeps what it gets."""

    def __init__(self, fails: bool = False) -> None:
        self.fails = fails
        self.calls = 0
        self.records: list[MetricRecord] = []
        self.is_closed = False
        self.thread = threading.current_thread()

    def write(self, records: Sequence[MetricRecord]) -> None:
        self.calls += 1
        self.thread = threading.current_thread()
        if self.fails:
            raise OSError("the disk is full")
        self.records += records

    def close(self) -> None:
        self.is_closed = True


def test_a_line_has_the_documented_keys_and_scores_only_where_there_are_some(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "metrics.jsonl", 0)
    file.write([record(1), replace(record(2), scores={"f1": 0.5, "loss": math.nan})])
    file.close()
    plain, scored = read_records((tmp_path / "metrics.jsonl").read_bytes())
    assert set(plain) == {
        "step",
        "epoch",
        "loss",
        "learning_rate",
        "grad_norm",
        "examples_per_s",
        "tokens_per_s",
        "memory_bytes",
    }
    assert scored["scores"] == {"f1": 0.5, "loss": None}


def test_nan_is_written_as_null_because_json_has_none(tmp_path: Path) -> None:
    file = JsonlFile(tmp_path / "metrics.jsonl", 0)
    file.write([replace(record(1), grad_norm=math.inf)])
    file.close()
    line = (tmp_path / "metrics.jsonl").read_text()
    assert json.loads(line, parse_constant=lambda name: pytest.fail(name))["grad_norm"] is None


def test_a_resumed_run_drops_what_lies_beyond_its_step_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlFile(path, 0)
    first.write([record(10), record(20), record(30)])
    first.close()
    path.write_bytes(path.read_bytes() + b'{"step": 40, "lo')
    second = JsonlFile(path, 20)
    second.write([record(30)])
    second.close()
    assert steps_of(path.read_bytes()) == [10, 20, 30]


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ObjectStore:
    """A directory, and a bucket of an S3 server."""
    if request.param == "local":
        return ObjectStore.open(str(tmp_path))
    return ObjectStore.open(f"{request.getfixturevalue('s3_bucket')}/{secrets.token_hex(8)}", timeout_s=20)


def test_segments_become_one_file_at_the_end(store: ObjectStore) -> None:
    segments = JsonlSegments(store, "runs/a/r1", 0)
    for start in range(1, RECORDS_PER_SEGMENT + 3, 100):
        segments.write([record(step) for step in range(start, min(start + 100, RECORDS_PER_SEGMENT + 3))])
    assert len(list(store.list("runs/a/r1/metrics"))) == 2
    segments.close()
    assert [info.key for info in store.list("runs/a/r1")] == ["runs/a/r1/metrics.jsonl"]
    assert steps_of(store.get("runs/a/r1/metrics.jsonl")) == list(range(1, RECORDS_PER_SEGMENT + 3))


def test_segments_of_a_killed_run_are_cut_at_the_resumed_step(store: ObjectStore) -> None:
    killed = JsonlSegments(store, "runs/a/r1", 0)
    killed.write([record(10), record(20)])
    killed.write([record(30)])
    again = JsonlSegments(store, "runs/a/r1", 20)
    again.write([record(30), record(40)])
    again.close()
    assert steps_of(store.get("runs/a/r1/metrics.jsonl")) == [10, 20, 30, 40]


def test_records_are_written_in_another_thread_and_all_of_them_at_the_end() -> None:
    sink = Memory()
    writer = MetricWriter([sink], flush_interval_s=60)
    for step in range(1, 101):
        writer.write(record(step))
    writer.close()
    assert [entry.step for entry in sink.records] == list(range(1, 101))
    assert sink.is_closed and sink.calls == 1
    assert sink.thread is not threading.current_thread()


def test_a_flush_returns_when_the_sinks_have_everything() -> None:
    sink = Memory()
    writer = MetricWriter([sink], flush_interval_s=60)
    for step in range(1, 4):
        writer.write(record(step))
    writer.flush()
    assert [entry.step for entry in sink.records] == [1, 2, 3]
    assert not sink.is_closed
    writer.close()


def test_a_flush_of_a_closed_writer_returns_at_once(caplog: pytest.LogCaptureFixture) -> None:
    writer = MetricWriter([Memory()])
    writer.close()
    with caplog.at_level(logging.WARNING):
        writer.flush()
    assert caplog.text == ""


def test_a_flush_of_a_sink_that_hangs_is_given_up_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    gate = threading.Event()

    class Hanging(Memory):
        def write(self, records: Sequence[MetricRecord]) -> None:
            gate.wait(20)

    writer = MetricWriter([Hanging()])
    writer.write(record(1))
    with caplog.at_level(logging.WARNING):
        writer.flush(timeout_s=0.01)
    assert "a crash would lose the last ones" in caplog.text
    gate.set()
    writer.close()


def test_a_record_is_written_while_the_run_goes_on() -> None:
    written = threading.Event()

    class Signal(Memory):
        def write(self, records: Sequence[MetricRecord]) -> None:
            written.set()

    writer = MetricWriter([Signal()], flush_interval_s=0.0)
    writer.write(record(1))
    assert written.wait(10)
    writer.close()


def test_a_failing_sink_is_named_once_and_the_others_go_on(caplog: pytest.LogCaptureFixture) -> None:
    bad, good = Memory(fails=True), Memory()
    with caplog.at_level(logging.WARNING):
        writer = MetricWriter([bad, good], flush_interval_s=0.0)
        for step in (1, 2, 3):
            writer.write(record(step))
        writer.close()
    assert bad.calls == 1
    assert [entry.step for entry in good.records] == [1, 2, 3]
    assert [entry.message for entry in caplog.records] == [
        "Memory takes no more metrics: OSError: the disk is full"
    ]


def test_tensorboard_reads_the_values_back(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sink = TensorBoardFiles(tmp_path, 0)
    sink.write([record(1), replace(record(2), scores={"f1": 0.5})])
    sink.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.25), (2, 1.25)]
    assert [(event.step, event.value) for event in events.Scalars("eval/f1")] == [(2, 0.5)]


def test_tensorboard_files_for_another_place_are_uploaded() -> None:
    uploaded: dict[str, bytes] = {}
    sink = TensorBoardFiles(None, 0, uploaded.__setitem__)
    sink.write([record(1)])
    sink.close()
    assert len(uploaded) == 1 and len(next(iter(uploaded.values()))) > 100


def test_throughput_leaves_out_evaluations() -> None:
    now = [0.0]
    throughput = Throughput(lambda: now[0])
    throughput.add(64, 640)
    now[0] = 2.0
    with throughput.paused():
        now[0] = 12.0
    assert throughput.take() == (32.0, 320.0)
    now[0] = 13.0
    assert throughput.take() == (0.0, 0.0)
