from __future__ import annotations

import json
from pathlib import Path

import pytest
from ray_cluster import RayCluster

from eagleray.cluster import connect
from eagleray.config.schema import RunConfig
from eagleray.errors import DataError
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray_jobs.data.prepare import prepare
from eagleray_jobs.data.ray_pieces import FEWEST_PIECES, run_with_ray

ROWS_PER_FILE = 40


def write_files(folder: Path, bad: int | None = None) -> RunConfig:
    for number in range(FEWEST_PIECES + 2):
        lines = [json.dumps({"text": f"text {number} {i}", "label": i % 2}) for i in range(ROWS_PER_FILE)]
        if number == bad:
            lines[7] = "{"
        (folder / f"{number:02d}.jsonl").write_text("\n".join(lines))
    return RunConfig.model_validate(
        {
            "name": "test",
            "task": "text-classification",
            "model": {"family": "bert", "tokenizer": {"vocab_size": 300}},
            "data": {"train": str(folder / "*.jsonl")},
        }
    )


def test_ray_data_prepares_the_same_rows_in_the_same_order(ray_cluster: RayCluster, tmp_path: Path) -> None:
    config = write_files(tmp_path)
    stores = [ObjectStore.open(str(tmp_path / name)) for name in ("parallel", "in-line")]
    with connect(ray_cluster.address):
        parallel = prepare(config, load_task(config), stores[0], run_with_ray)
    in_line = prepare(config, load_task(config), stores[1])
    assert parallel.fingerprint == in_line.fingerprint
    for split in ("train", "validation", "test"):
        ours, theirs = parallel.split(split), in_line.split(split)
        assert len(ours) == len(theirs) > 0
        assert [ours[i] for i in range(len(ours))] == [theirs[i] for i in range(len(theirs))]


def test_a_bad_row_in_a_worker_stops_with_its_place(ray_cluster: RayCluster, tmp_path: Path) -> None:
    config = write_files(tmp_path, bad=9)
    store = ObjectStore.open(str(tmp_path / "store"))
    config = config.model_copy(update={"data": config.data.model_copy(update={"labels": ["0", "1"]})})
    with connect(ray_cluster.address), pytest.raises(DataError, match=r"09\.jsonl:8: is not valid JSON"):
        prepare(config, load_task(config), store, run_with_ray)
