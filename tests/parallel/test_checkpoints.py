"""Saved by some ranks, read by others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from checkpoints import NAME, load, save, whole_tensors
from ranks import RankGroup

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
