"""What a worker's memory holds of the data: measured in a process of its own.

Counted is what belongs to the process alone (RssAnon). The mapped pages of the files are the page cache's: all
workers of a machine share them, and the system takes them back when it needs to.
"""

from __future__ import annotations

import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import pytest

from eagleray.store.objects import ObjectStore
from eagleray_jobs.data.arrow import write_rows
from eagleray_jobs.data.manifest import DataManifest, DataSummary, PreparedFile, manifest_key

ROWS_PER_FILE = 10_000
LIMIT_BYTES = 100 * 1000 * 1000
WORKER = """
import re
import sys
from pathlib import Path
from eagleray.store.objects import ObjectStore
from eagleray_jobs.data.cursor import Cursor
from eagleray_jobs.data.dataset import PreparedData

store, num_rows = ObjectStore.open(sys.argv[1]), int(sys.argv[2])
def own_bytes():
    return 1024 * int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

before = own_bytes()
rows = PreparedData(store, "big").split("train")
cursor = Cursor(len(rows), 64, seed=0, lengths=rows.lengths)
seen = 0
for step in range(num_rows // 64):
    seen += sum(len(rows[int(i)]["input_ids"]) for i in cursor.batch(step))
print(len(rows), seen, own_bytes() - before)
"""


def write_data(store: ObjectStore, num_rows: int) -> None:
    features = [
        {"input_ids": list(range(i % 5, i % 5 + 16)), "labels": list(range(16))} for i in range(ROWS_PER_FILE)
    ]
    examples = [
        {"source": "a sentence of some words", "target": "une phrase", "key": str(i)} for i in range(ROWS_PER_FILE)
    ]
    data = write_rows(features, [16] * ROWS_PER_FILE, examples)
    files = [
        PreparedFile(f"data/big/a/train-{n:05d}.arrow", len(data), sha256(data).hexdigest(), ROWS_PER_FILE)
        for n in range(num_rows // ROWS_PER_FILE)
    ]
    for file in files:
        store.put(file.key, data)
    none = {"train": 0, "validation": 0, "test": 0}
    summary = DataSummary("made for a test", none, none, none, 0, [], 0.0)  # type: ignore[arg-type]
    splits = {"train": files, "validation": [], "test": []}
    store.put(manifest_key("big"), DataManifest("big", splits, {}, summary).to_json())  # type: ignore[arg-type]


@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells what belongs to a process alone")
@pytest.mark.parametrize("num_rows", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_rows_do_not_fill_the_memory_of_a_worker(tmp_path: Path, num_rows: int) -> None:
    store = ObjectStore.open(str(tmp_path / "store"))
    write_data(store, num_rows)
    done = subprocess.run(
        [sys.executable, "-c", WORKER, store.location, str(num_rows)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    num_read, num_tokens, grown_bytes = map(int, done.stdout.split())
    print("grown bytes", grown_bytes)
    assert num_read == num_rows and num_tokens == num_rows // 64 * 64 * 16
    assert grown_bytes < LIMIT_BYTES * (0.5 if num_rows < 1_000_000 else 1)
