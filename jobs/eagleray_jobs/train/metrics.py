"""Metrics of a run: records that a thread writes, so that no step waits for a file or a store."""

from __future__ import annotations

import json
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, BinaryIO, Protocol

import torch

from eagleray.scheduling import give_way
from eagleray.store.objects import ObjectStore
from eagleray_jobs.train.spec import MetricRecord

FILE_NAME = "metrics.jsonl"
SEGMENT_FOLDER = "metrics"
RECORDS_PER_SEGMENT = 500
FLUSH_INTERVAL_S = 5.0
CLOSE_TIMEOUT_S = 30.0
FLUSH_POLL_S = 0.1

logger = logging.getLogger(__name__)


class MetricSink(Protocol):
    """A place that metrics go to; called from one thread. Ray's metrics are one such place."""

    def write(self, records: Sequence[MetricRecord]) -> None:
        """Take some records, oldest first."""
        ...

    def close(self) -> None:
        """Write what is left."""
        ...


class MetricWriter:
    """Hands records to the sinks in a thread of its own.

    A sink that fails is left out from then on, with a warning: metrics never end a run. What was written before
    a `flush` survives whatever happens to this process after it.
    """

    def __init__(self, sinks: Sequence[MetricSink], *, flush_interval_s: float = FLUSH_INTERVAL_S) -> None:
        self._sinks = list(sinks)
        self._flush_interval_s = flush_interval_s
        self._queue: SimpleQueue[MetricRecord | Event] = SimpleQueue()
        self._end = Event()
        self._thread = Thread(target=self._run, name="metrics", daemon=True)
        self._thread.start()

    def write(self, record: MetricRecord) -> None:
        """Take a record; returns at once."""
        self._queue.put(record)

    def flush(self, timeout_s: float = CLOSE_TIMEOUT_S) -> None:
        """Wait until the sinks have what was written so far; gives up with a warning."""
        written, deadline = Event(), time.monotonic() + timeout_s
        self._queue.put(written)
        # A writer that is closed has written everything, and nobody is there to say so.
        while not written.wait(FLUSH_POLL_S) and self._thread.is_alive():
            if time.monotonic() > deadline:
                logger.warning(
                    "metrics were still being written after %.0f s; a crash would lose the last ones", timeout_s
                )
                return

    def close(self) -> None:
        """Write what is left and end the thread."""
        self._queue.put(self._end)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            logger.warning(
                "metrics were still being written after %.0f s; the last ones are lost", CLOSE_TIMEOUT_S
            )

    def _run(self) -> None:
        give_way()
        written: Event | None = None
        while written is not self._end:
            records, written = self._take()
            for sink in list(self._sinks):
                self._try(sink, records)
            if written is not None:
                written.set()
        for sink in self._sinks:
            self._try(sink, None)

    def _take(self) -> tuple[list[MetricRecord], Event | None]:
        """Wait for a record, gather what comes within the flush interval, and say who waits for it."""
        records: list[MetricRecord] = []
        deadline: float | None = None
        while True:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
            try:
                entry = self._queue.get(timeout=timeout)
            except Empty:
                return records, None
            if isinstance(entry, Event):
                return records, entry
            records.append(entry)
            deadline = deadline or time.monotonic() + self._flush_interval_s

    def _try(self, sink: MetricSink, records: Sequence[MetricRecord] | None) -> None:
        try:
            if records is None:
                sink.close()
            elif records:
                sink.write(records)
        except Exception as error:
            logger.warning("%s takes no more metrics: %s: %s", type(sink).__name__, type(error).__name__, error)
            self._sinks = [other for other in self._sinks if other is not sink]


class JsonlFile:
    """`metrics.jsonl` in a local store: appended to line by line, so that `tail -f` follows it.

    Args:
        path: The file.
        after_step: Records beyond this step belong to steps that are about to be run again; they go.
    """

    def __init__(self, path: Path, after_step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = _lines_up_to(path.read_bytes(), after_step) if path.exists() else b""
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(kept)
        os.replace(temporary, path)
        self._file: BinaryIO = path.open("ab", buffering=0)

    def write(self, records: Sequence[MetricRecord]) -> None:
        """Append the records in one write."""
        self._file.write(_encode(records))
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class JsonlSegments:
    """`metrics.jsonl` in an object store, which cannot append: numbered segments, merged when the run ends.

    Args:
        store: The store.
        folder: The run's folder in it.
        after_step: Records beyond this step go.
    """

    def __init__(self, store: ObjectStore, folder: str, after_step: int) -> None:
        self._store = store
        self._folder = folder
        self._open: list[MetricRecord] = []
        self._merge(after_step)
        self._number = 0

    def write(self, records: Sequence[MetricRecord]) -> None:
        """Replace the open segment by a longer one; a full one is left behind."""
        self._open += records
        self._store.put(f"{self._folder}/{SEGMENT_FOLDER}/{self._number:08d}.jsonl", _encode(self._open))
        if len(self._open) >= RECORDS_PER_SEGMENT:
            self._open, self._number = [], self._number + 1

    def close(self) -> None:
        """Make one file of all segments."""
        self._merge(None)

    def _merge(self, after_step: int | None) -> None:
        """Merge the file and its segments. Dying in between leaves lines twice only until the next merge."""
        file_key = f"{self._folder}/{FILE_NAME}"
        segments = [info.key for info in self._store.list(f"{self._folder}/{SEGMENT_FOLDER}")]
        existing = [file_key] if self._store.exists(file_key) else []
        text = b"".join(self._store.get(key) for key in [*existing, *segments])
        if text:
            self._store.put(file_key, _lines_up_to(text, after_step))
        for key in segments:
            self._store.delete(key)


class TensorBoardFiles:
    """TensorBoard event files, written locally; `upload` takes each of them to where it belongs.

    Args:
        folder: Where TensorBoard reads. None: a temporary folder whose files are uploaded.
        after_step: Steps beyond this one are hidden by TensorBoard from here on.
        upload: Called with a file's name and bytes after every write, where `folder` is None.
    """

    def __init__(self, folder: Path | None, after_step: int, upload: Any = None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._temporary = tempfile.TemporaryDirectory(prefix="tensorboard-") if folder is None else None
        self._folder = folder or Path(self._temporary.name if self._temporary else "")
        self._upload = upload
        self._writer = SummaryWriter(str(self._folder), purge_step=after_step + 1)

    def write(self, records: Sequence[MetricRecord]) -> None:
        """Add one point per value."""
        for record in records:
            values = record.as_json()
            step, scores = values.pop("step"), values.pop("scores", {})
            for name, value in {**values, **{f"eval/{key}": score for key, score in scores.items()}}.items():
                if value is not None:
                    self._writer.add_scalar(name if "/" in name else f"train/{name}", value, step)
        self._writer.flush()
        self._upload_files()

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()
        self._upload_files()
        if self._temporary is not None:
            self._temporary.cleanup()

    def _upload_files(self) -> None:
        if self._upload is not None:
            for path in sorted(self._folder.iterdir()):
                self._upload(path.name, path.read_bytes())


class Throughput:
    """Examples and tokens per second of training; evaluations do not count.

    Args:
        clock: Monotonic seconds.
    """

    def __init__(self, clock: Any = time.monotonic) -> None:
        self._clock = clock
        self._reset()

    def add(self, num_examples: int, num_tokens: int) -> None:
        """Count a step of all workers."""
        self._num_examples += num_examples
        self._num_tokens += num_tokens

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave out the time inside."""
        start = self._clock()
        yield
        self._start += self._clock() - start

    def take(self) -> tuple[float, float]:
        """Return examples per second and tokens per second since the last call."""
        elapsed_s = max(self._clock() - self._start, 1e-9)
        rates = self._num_examples / elapsed_s, self._num_tokens / elapsed_s
        self._reset()
        return rates

    def _reset(self) -> None:
        self._start = self._clock()
        self._num_examples = 0
        self._num_tokens = 0


def memory_bytes(device: torch.device) -> int:
    """Return the peak memory of a GPU's allocator, or this process's resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import psutil

    return int(psutil.Process().memory_info().rss)


def read_records(text: bytes) -> list[dict[str, Any]]:
    """Parse `metrics.jsonl`; a last line that was cut off by a crash is left out."""
    lines = text.split(b"\n")
    return [json.loads(line) for line in lines[:-1] if line]


def _encode(records: Sequence[MetricRecord]) -> bytes:
    return b"".join(json.dumps(record.as_json()).encode() + b"\n" for record in records)


def _lines_up_to(text: bytes, step: int | None) -> bytes:
    """Keep the records up to a step, each step once."""
    kept = {record["step"]: record for record in read_records(text) if step is None or record["step"] <= step}
    return b"".join(json.dumps(kept[key]).encode() + b"\n" for key in sorted(kept))
