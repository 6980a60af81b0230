"""Inputs and prepared data in an object store, over S3's own protocol."""

from __future__ import annotations

import json
import secrets
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from eagleray.config.schema import RunConfig
from eagleray.errors import DataError
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.data.files import find_files
from eagleray_jobs.data.prepare import prepare
from eagleray_jobs.data.sources import open_source

ROWS = [{"source": f"{n} July, on \u00e9t\u00e9", "target": f"le {n} juillet"} for n in range(1, 31)]


@pytest.fixture
def bucket(s3_bucket: str) -> ObjectStore:
    """A place of its own in the bucket."""
    return ObjectStore.open(f"{s3_bucket}/{secrets.token_hex(8)}", timeout_s=20)


def config_of(train: Any, **data: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "test",
            "task": "translation",
            "model": {"family": "marian", "tokenizer": {"vocab_size": 300}},
            "data": {"train": train, "validation_split": 0.0, "test_split": 0.0, **data},
        }
    )


def encoded() -> dict[str, bytes]:
    """The rows in every format."""
    table = BytesIO()
    parquet.write_table(pa.Table.from_pylist(ROWS), table, row_group_size=7)
    lines = [json.dumps(row) for row in ROWS]
    return {
        "rows-1.jsonl": "\n".join(lines[:20]).encode(),
        "rows-2.jsonl": "\n".join(lines[20:]).encode(),
        "rows.csv": "\n".join(["source,target", *(f'"{r["source"]}",{r["target"]}' for r in ROWS)]).encode(),
        "rows.tsv": "\n".join(["source\ttarget", *(f"{r['source']}\t{r['target']}" for r in ROWS)]).encode(),
        "rows.parquet": table.getvalue(),
        "rows.en": "\n".join(row["source"] for row in ROWS).encode(),
        "rows.fr": "\n".join(row["target"] for row in ROWS).encode(),
    }


def test_every_format_gives_the_same_rows_from_a_bucket_as_from_a_directory(
    bucket: ObjectStore, tmp_path: Path
) -> None:
    for name, data in encoded().items():
        bucket.put(name, data)
        (tmp_path / name).write_bytes(data)
    for here in (
        lambda folder: f"{folder}/rows-*.jsonl",
        lambda folder: [f"{folder}/rows-1.jsonl", f"{folder}/rows-2.jsonl"],
        lambda folder: f"{folder}/rows.csv",
        lambda folder: f"{folder}/rows.tsv",
        lambda folder: f"{folder}/rows.parquet",
        lambda folder: {"source": f"{folder}/rows.en", "target": f"{folder}/rows.fr"},
    ):
        found = []
        for folder in (bucket.location, str(tmp_path)):
            source = open_source(config_of(here(folder)).data)
            found.append((source.content, [row.values for piece in source.pieces for row in piece.rows()]))
        assert found[0] == found[1]
        assert found[0][1] == ROWS


def test_an_object_that_is_not_there_and_a_scheme_that_is_not_supported_are_named(bucket: ObjectStore) -> None:
    for pattern, problem in (
        (f"{bucket.location}/no.csv", "does not exist"),
        (f"{bucket.location}/*.csv", "no file"),
    ):
        with pytest.raises(DataError, match=problem):
            find_files(pattern)


def test_prepared_data_in_a_bucket_is_copied_once_for_all_workers_of_a_machine_and_verified(
    bucket: ObjectStore, tmp_path: Path
) -> None:
    bucket.put("in/rows.parquet", encoded()["rows.parquet"])
    config = config_of(f"{bucket.location}/in/rows.parquet")
    notes: list[str] = []
    fingerprint = prepare(config, load_task(config), bucket, notify=notes.append).fingerprint
    here = prepare(config, load_task(config), ObjectStore.open(str(tmp_path / "local")))
    expected = list(here.split("train"))
    assert here.fingerprint == fingerprint and len(expected) == len(ROWS)

    def worker(cache: str) -> list[Any]:
        return list(PreparedData(bucket, fingerprint, cache_dir=tmp_path / cache).split("train"))

    with ThreadPoolExecutor(4) as pool:
        assert all(rows == expected for rows in pool.map(worker, ["cache"] * 4))
    copies = list((tmp_path / "cache" / "data").glob("*.arrow*"))
    files = here.manifest.splits["train"]
    assert sorted(path.name for path in copies) == sorted(f"{file.sha256}.arrow" for file in files)

    for file in PreparedData(bucket, fingerprint).manifest.splits["train"]:
        data = bytearray(bucket.get(file.key))
        data[len(data) // 2] ^= 1
        bucket.put(file.key, bytes(data))
    assert worker("cache") == expected  # what was copied before needs nobody
    with pytest.raises(DataError, match="is damaged"):
        worker("another-machine")
    assert not list((tmp_path / "another-machine" / "data").glob("*.arrow*"))


def test_images_lie_beside_the_rows_that_name_them_or_anywhere_in_a_bucket(bucket: ObjectStore) -> None:
    for name, grey in (("near.png", 10), ("far.png", 200)):
        png = BytesIO()
        Image.new("L", (8, 8), grey).save(png, "PNG")
        bucket.put(f"images/{name}", png.getvalue())
    rows = [
        {"image": "../no.png", "label": "bad"},
        {"image": "near.png", "label": "near"},
        {"image": f"{bucket.location}/images/far.png", "label": "far"},
        {"image": "gone.png", "label": "near"},
        {"image": "http://169.254.169.254/x.png", "label": "near"},
    ]
    bucket.put("images/rows.jsonl", "\n".join(map(json.dumps, rows)).encode())
    config = RunConfig.model_validate(
        {
            "name": "test",
            "task": "image-classification",
            "model": {"family": "vit", "config": {"image_size": 8, "patch_size": 4, "num_channels": 1}},
            "data": {
                "train": f"{bucket.location}/images/rows.jsonl", "labels": ["near", "far"], "on_bad_row": "skip",
                "validation_split": 0.0, "test_split": 0.0,
            },
        }
    )  # fmt: skip
    data = prepare(config, load_task(config), bucket)
    rows_there = data.split("train")
    assert [row["label"] for row in rows_there] == [0, 1]
    assert [Image.open(BytesIO(row["image"])).getpixel((0, 0)) for row in rows_there] == [10, 200]
    assert data.summary.num_skipped == 3
    assert "gone.png" in "\n".join(data.summary.skipped)
