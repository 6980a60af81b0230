"""Saved by some ranks, read by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import NAME, load, load_damaged, load_large, save, save_large, whole_tensors
from ranks import RankGroup
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore

VERSION = "r1-step-00000007"


@pytest.fixture(scope="module")
def saved_by_two(group: Callable[[int], RankGroup], tmp_path_factory: pytest.TempPathFactory) -> str:
    location = str(tmp_path_factory.mktemp("store"))
    results = group(2).run(save, location, 7)
    assert [[result.ref for result in rank] for rank in results] == [[f"{NAME}@{VERSION}"]] * 2
    return location


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_what_two_saved(
    group: Callable[[int], RankGroup], saved_by_two: str, world_size: int
) -> None:
    results = group(world_size).run(load, saved_by_two, VERSION)
    assert [is_equal for is_equal, _ in results] == [True] * world_size


def test_one_process_reads_what_two_saved_bit_for_bit(saved_by_two: str) -> None:
    checkpoint = Checkpoint.open(ObjectStore.open(saved_by_two), NAME, VERSION)
    read, whole = checkpoint.tensors(prefix=""), whole_tensors()
    assert read.keys() == whole.keys()
    assert all(torch.equal(read[name], whole[name]) and read[name].dtype == whole[name].dtype for name in whole)
    assert checkpoint.verify() == []


def test_a_replicated_tensor_is_stored_once(saved_by_two: str) -> None:
    manifest = Checkpoint.open(ObjectStore.open(saved_by_two), NAME, VERSION).manifest
    shards = {tensor.name: len(tensor.shards) for tensor in manifest.tensors}
    assert shards["model.replicated.weight"] == shards["optim.sharded.weight.step"] == 1
    assert shards["model.sharded.weight"] == 2
    assert shards["model.tiny.weight"] == 1
    stored = sum(shard.end - shard.start for tensor in manifest.tensors for shard in tensor.shards)
    assert stored == sum(tensor.nbytes for tensor in whole_tensors().values())


def test_a_rank_reads_only_the_blocks_it_needs(group: Callable[[int], RankGroup], saved_by_two: str) -> None:
    total = sum(tensor.nbytes for tensor in whole_tensors().values())
    results = group(2).run(load, saved_by_two, VERSION)
    assert all(0 < num_bytes < total for _, num_bytes in results)


def test_a_tensor_replicated_and_cut_is_stored_once(group: Callable[[int], RankGroup], tmp_path: Path) -> None:
    group(4).run(save, str(tmp_path), 7, True)
    checkpoint = Checkpoint.open(ObjectStore.open(str(tmp_path)), NAME, VERSION)
    read, whole = checkpoint.tensors(prefix=""), whole_tensors()
    assert all(torch.equal(read[name], whole[name]) for name in whole)
    stored = sum(shard.end - shard.start for tensor in checkpoint.manifest.tensors for shard in tensor.shards)
    assert stored == sum(tensor.nbytes for tensor in whole.values())


@pytest.mark.parametrize("written", ["whole", "rows", "columns"])
def test_a_rank_reads_its_share_of_the_bytes_whoever_wrote_them(
    group: Callable[[int], RankGroup], tmp_path: Path, written: str
) -> None:
    by_two: dict[str, list[Placement]] = {"whole": [Replicate()], "rows": [Shard(0)], "columns": [Shard(1)]}
    group(2).run(save_large, str(tmp_path), by_two[written])
    for mesh_shape, placements in [((4,), [Shard(0)]), ((4,), [Shard(1)]), ((2, 2), [Shard(0), Shard(1)])]:
        assert group(4).run(load_large, str(tmp_path), mesh_shape, placements) == [0.25] * 4
    assert group(2).run(load_large, str(tmp_path), (2,), [Shard(1)]) == [0.5] * 2
    thirds = group(3).run(load_large, str(tmp_path), (3,), [Shard(0)])
    # A third touches three of eight blocks of rows and the middle one four; of four wider ones, two.
    assert thirds == ([1 / 2] * 3 if written == "columns" else [3 / 8, 4 / 8, 3 / 8])


def test_a_damaged_block_is_refused_by_the_rank_that_reads_it_and_the_others_hear_of_it(
    group: Callable[[int], RankGroup], tmp_path: Path
) -> None:
    group(2).run(save_large, str(tmp_path), [Replicate()])
    for path in tmp_path.glob("models/m/*/*/model-*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    messages = group(2).run(load_damaged, str(tmp_path))
    assert messages[1].count("is damaged: bytes") == 1 and "rank" not in messages[1]
    assert messages[0].startswith("rank 1: ")
