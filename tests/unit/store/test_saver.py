"""Saving in the background from one process."""

from __future__ import annotations

import hashlib
import json
import threading
from pathlib import Path

import pytest
import torch
from faulty import Countdown, FaultyStore, Gate
from safetensors.torch import load_file
from versions_made import NAME, commit, config, owned_run, tensors

from eagleray.config.layout import Layout
from eagleray.errors import StoreError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.manifest import TensorEntry, canonical_json, manifest_key, parse_manifest
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.store.safetensors import Piece, SafetensorsStream, as_array, block_size, dtype_name
from eagleray.store.saver import CheckpointSaver, SaveResult


def saver_of(store: ObjectStore) -> CheckpointSaver:
    return CheckpointSaver(
        store, owned_run(store), layout=Layout(), config=config(), best_metric=("bleu", True), timeout_s=20
    )


def save_with(
    saver: CheckpointSaver, step: int, saved: dict[str, torch.Tensor] | None = None, copy: bool = True
) -> None:
    saver.save(
        step=step,
        tensors=saved or tensors(),
        files={},
        state={"step": step},
        metrics={"bleu": float(step)},
        copy=copy,
    )


def test_the_training_may_change_tensors_at_once(tmp_path: Path) -> None:
    gate = Gate()
    saver = saver_of(FaultyStore(str(tmp_path), gate))
    changing = tensors()
    save_with(saver, 1, changing)
    for tensor in changing.values():
        tensor.zero_()
    assert saver.poll() == []
    gate.is_open.set()
    saver.wait()
    saver.close()
    read = Registry(ObjectStore.open(str(tmp_path))).open(NAME).tensors(prefix="")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())


def test_tensors_that_stay_as_they_are_are_written_without_a_copy(tmp_path: Path) -> None:
    gate, kept = Gate(), tensors()
    saver = saver_of(FaultyStore(str(tmp_path), gate))
    save_with(saver, 1, kept, copy=False)
    assert gate.is_reached.wait(20)
    kept["model.weight"].add_(1)  # shows that it is this memory
    gate.is_open.set()
    saver.wait()
    saver.close()
    read = Registry(ObjectStore.open(str(tmp_path))).open(NAME).tensors(prefix="")
    assert all(torch.equal(read[name], tensor) for name, tensor in kept.items())


def test_a_due_save_waits_for_the_one_in_flight(tmp_path: Path) -> None:
    gate = Gate()
    saver = saver_of(FaultyStore(str(tmp_path), gate))
    save_with(saver, 1)
    assert gate.is_reached.wait(20)
    second = threading.Thread(target=save_with, args=(saver, 2), daemon=True)
    second.start()
    second.join(0.2)
    assert second.is_alive()
    gate.is_open.set()
    second.join(20)
    assert not second.is_alive()
    assert [result.ref for result in saver.wait()] == [f"{NAME}@r1-step-00000001", f"{NAME}@r1-step-00000002"]
    saver.close()


def test_each_save_is_reported_once(local_store: ObjectStore) -> None:
    saver = saver_of(local_store)
    save_with(saver, 1)
    reported: list[SaveResult] = []
    while not reported:
        reported += saver.poll()
    assert saver.poll() == saver.wait() == []
    assert reported[0].step == 1 and reported[0].size_bytes > 0 and reported[0].seconds > 0
    saver.close()


def test_failures_are_values_until_the_third_in_a_row(tmp_path: Path) -> None:
    refuse = Countdown()
    saver = saver_of(FaultyStore(str(tmp_path), refuse))
    refuse.fail_at = 0
    for step in (1, 2):
        save_with(saver, step)
        (result,) = saver.wait()
        assert result.ref is None and "refused" in (result.error or "")
    refuse.fail_at = None
    save_with(saver, 3)
    assert saver.wait()[0].ref is not None
    refuse.fail_at = refuse.num_operations
    for step in (4, 5, 6):
        save_with(saver, step)
    with pytest.raises(StoreError, match=r"3 saves in a row failed \(steps 4, 5, 6\); the last one: refused"):
        save_with(saver, 7)
    saver.close()


def test_what_must_not_be_lost_is_written_before_the_commit(local_store: ObjectStore) -> None:
    saver = saver_of(local_store)
    committed: list[bool] = []

    def flush() -> None:
        committed.append(local_store.exists(manifest_key(NAME, "r1-step-00000001")))

    saver.save(step=1, tensors=tensors(), files={}, state={"step": 1}, metrics={}, before_commit=flush)
    (result,) = saver.wait()
    assert committed == [False] and result.ref is not None
    saver.close()


def test_a_failure_before_the_commit_fails_the_save(local_store: ObjectStore) -> None:
    saver = saver_of(local_store)

    def fail() -> None:
        raise OSError("no space left")

    saver.save(step=1, tensors=tensors(), files={}, state={"step": 1}, metrics={}, before_commit=fail)
    (result,) = saver.wait()
    assert result.ref is None and "no space left" in (result.error or "")
    saver.close()


def test_what_cannot_be_stored_fails_the_save_with_its_type(local_store: ObjectStore) -> None:
    saver = saver_of(local_store)
    save_with(saver, 1, {"model.w": torch.zeros(2, dtype=torch.complex128)})
    (result,) = saver.wait()
    assert result.ref is None and "torch.complex128 cannot be stored" in (result.error or "")
    saver.close()


def test_the_manifest_says_what_was_saved(local_store: ObjectStore) -> None:
    saver = saver_of(local_store)
    metrics = {"bleu": 1.0, "loss": float("nan")}
    saver.save(step=1, tensors=tensors(), files={"config.json": b"{}"}, state={"step": 1}, metrics=metrics)
    saver.wait()
    saver.close()
    checkpoint = Registry(local_store).open(NAME)
    manifest = checkpoint.manifest
    assert (manifest.layout, manifest.metrics) == ("single", {"bleu": 1.0, "loss": None})
    assert manifest.best_metric == ("bleu", True)
    assert manifest.versions["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert [tensor.name for tensor in manifest.tensors] == ["model.bias", "model.weight", "optim.weight.step"]
    assert checkpoint.config() == config()
    assert checkpoint.state() == {"step": 1}
    assert checkpoint.files() == {"config.json": b"{}"}


def test_a_file_of_tensors_is_one_that_safetensors_reads(tmp_path: Path) -> None:
    pieces = [
        Piece("model.w", (0, 0), (4, 3), torch.arange(12.0).reshape(4, 3)),
        Piece("model.half", (2,), (4,), torch.ones(2).half()),
        Piece("model.flag", (), (), torch.tensor(True)),
    ]
    stream = SafetensorsStream("a/model-00000.safetensors", pieces, block_bytes=24)
    (tmp_path / "file").write_bytes(b"".join(stream))
    read = load_file(tmp_path / "file")
    assert torch.equal(read["model.w"], pieces[0].local)
    assert torch.equal(read["model.half[2]"], pieces[1].local)
    assert torch.equal(read["model.flag"], pieces[2].local)
    assert stream.file.size == (tmp_path / "file").stat().st_size
    assert [(shard.offsets, shard.sizes) for shard in stream.shards["model.w"]] == [
        ((0, 0), (2, 3)),
        ((2, 0), (2, 3)),
    ]


def test_a_large_matrix_is_stored_in_panels_of_columns_and_blocks_of_rows(tmp_path: Path) -> None:
    matrix = torch.arange(64 * 24.0).reshape(64, 24)
    stream = SafetensorsStream(
        "a/m.safetensors", [Piece("model.w", (8, 0), (96, 24), matrix)], block_bytes=64 * 24 * 4 // 16
    )
    (tmp_path / "file").write_bytes(b"".join(stream))
    read = load_file(tmp_path / "file")
    assert list(read) == [f"model.w[8,{column}]" for column in (0, 12, 18, 6)]
    assert all(torch.equal(panel, matrix[:, int(key[10:-1]) :][:, :6]) for key, panel in read.items())
    shards = stream.shards["model.w"]
    assert {shard.sizes for shard in shards} == {(16, 6)} and len(shards) == 16
    assert {shard.offsets for shard in shards} == {
        (8 + row, col) for row in range(0, 64, 16) for col in range(0, 24, 6)
    }


def test_blocks_are_small_beside_a_file_but_not_many() -> None:
    assert [block_size(size) for size in (1000, 1 << 30, 1 << 40)] == [16384, 262144, 8388608]


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.bfloat16, torch.int8, torch.bool, torch.uint16, torch.float8_e4m3fn]
)
def test_every_type_has_a_name_and_bytes(dtype: torch.dtype) -> None:
    tensor = torch.tensor([0, 1, 1]).to(dtype)
    assert as_array(tensor).nbytes == 3 * tensor.element_size()
    assert dtype_name(dtype)


def test_a_manifest_is_canonical_json_whatever_the_names_in_it(local_store: ObjectStore) -> None:
    manifest = Checkpoint.open(local_store, NAME, commit(local_store, 1).split("@")[1]).manifest
    for metrics in ({}, {"run": 1.0, "step": 2.0, ',"run":': 3.0}):
        changed = manifest.model_copy(update={"metrics": metrics})
        record = json.loads(changed.to_bytes())
        assert canonical_json(record) == changed.to_bytes()
        assert record.pop("sha256") == hashlib.sha256(canonical_json(record)).hexdigest()


def test_shards_that_do_not_cover_a_tensor_once_are_refused(local_store: ObjectStore) -> None:
    manifest = Checkpoint.open(local_store, NAME, commit(local_store, 1).split("@")[1]).manifest
    bias, weight, step = manifest.tensors
    (whole,) = weight.shards
    upper = whole.model_copy(update={"sizes": (2, 3), "end": whole.start + 24})
    far = whole.model_copy(update={"offsets": (1, 0)})
    broken: dict[str, TensorEntry] = {
        "its shards hold 0 elements": weight.model_copy(update={"shards": ()}),
        "its shards hold 6 elements": weight.model_copy(update={"shards": (upper,)}),
        "overlap": weight.model_copy(update={"shards": (upper, upper)}),
        "a shard ends at": weight.model_copy(update={"shards": (far,)}),
        "dimensions": weight.model_copy(update={"shape": (12,)}),
        "a tensor is named twice": step,
    }
    for message, entry in broken.items():
        changed = manifest.model_copy(update={"tensors": (bias, entry, step)})
        with pytest.raises(Exception, match=message):
            parse_manifest(changed.to_bytes(), "manifest.json")
