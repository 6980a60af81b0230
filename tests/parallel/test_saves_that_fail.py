"""A save is committed on all ranks or on none, and the ranks agree on which."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from checkpoints import NAME, save
from ranks import RankGroup, RanksFailed
from saves_that_fail import (
    be_taken_over,
    die_in_a_save,
    fail_once,
    fail_three_times,
    load_damaged,
    look_whether_it_is_shared,
    save_beside_all_reduce,
)

from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry

Group = Callable[[int], RankGroup]


def whole_steps(location: Path) -> list[int]:
    """The steps of the committed versions, every one of them verified."""
    registry = Registry(ObjectStore.open(str(location)))
    versions = registry.versions(NAME)
    for version in versions:
        assert not [problem for problem in registry.open(version.ref).verify() if problem.is_damage]
    return [version.step for version in versions]


@pytest.mark.parametrize("fault, message", [("refuse", "refused"), ("break", "ZeroDivisionError")])
@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_rank_that_fails_makes_the_save_fail_on_all(
    group: Group, tmp_path: Path, fault: str, message: str, failing_rank: int
) -> None:
    first, second = group(2).run(fail_once, str(tmp_path), fault, failing_rank)
    assert [(result.step, result.ref, result.error) for result in first] == [
        (result.step, result.ref, result.error) for result in second
    ]
    assert [result.ref is not None for result in first] == [True, False, True]
    assert message in str(first[1].error) and f"rank {failing_rank}" in str(first[1].error)
    assert whole_steps(tmp_path) == [1, 3]


@pytest.mark.parametrize("failing_rank", [0, 1])
def test_a_rank_that_stalls_makes_the_save_fail_within_a_timeout_and_the_next_succeed(
    group: Group, tmp_path: Path, failing_rank: int
) -> None:
    first, second = group(2).run(fail_once, str(tmp_path), "stall", failing_rank)
    assert [result.ref for result in first] == [result.ref for result in second]
    assert [result.ref is not None for result in first] == [True, False, True]
    assert set(whole_steps(tmp_path)) >= {1, 3}


def test_the_third_failure_in_a_row_is_raised_on_all_ranks(group: Group, tmp_path: Path) -> None:
    first, second = group(2).run(fail_three_times, str(tmp_path), 1)
    assert first == second
    errors, raised = first
    assert len(errors) == 2 and all("refused" in str(error) for error in errors)
    assert "3 saves in a row failed (steps 1, 2, 3)" in raised
    assert whole_steps(tmp_path) == []


def test_a_run_that_was_taken_over_cannot_commit_on_any_rank(group: Group, tmp_path: Path) -> None:
    first, second = group(2).run(be_taken_over, str(tmp_path))
    assert first == second
    assert first.startswith("FencedError: run r1 of m was taken over by process 7 on another-host")
    assert whole_steps(tmp_path) == []


@pytest.mark.parametrize("dying_rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_killed_in_a_save_leaves_the_earlier_versions(tmp_path: Path, dying_rank: int) -> None:
    group = RankGroup(2)
    try:
        with pytest.raises(RanksFailed, match="exit status -9"):
            group.run(die_in_a_save, str(tmp_path), dying_rank, timeout_s=60)
        assert whole_steps(tmp_path) == [1]
        assert (tmp_path / f"seen-by-{1 - dying_rank}").read_text() == "PeersLostError"
        results = group.run(save, str(tmp_path), 2)
    finally:
        group.close()
    assert all(rank[0].ref == f"{NAME}@r1-step-00000002" for rank in results)
    assert whole_steps(tmp_path) == [1, 2]


def test_saves_and_the_collectives_of_the_training_do_not_mix(group: Group, tmp_path: Path) -> None:
    results = group(2).run(save_beside_all_reduce, str(tmp_path), 10)
    assert results == [(10, 400.0)] * 2


def test_damage_in_one_rank_s_part_is_refused_by_all(group: Group, tmp_path: Path) -> None:
    group(2).run(save, str(tmp_path), 7)
    checkpoint = Checkpoint.open(ObjectStore.open(str(tmp_path)), NAME, "r1-step-00000007")
    tensor = next(tensor for tensor in checkpoint.manifest.tensors if tensor.name == "model.sharded.weight")
    path = checkpoint.store.local_path(f"{checkpoint.base}/{tensor.shards[1].file}")
    assert path is not None
    data = bytearray(path.read_bytes())
    data[tensor.shards[1].start] ^= 1
    path.write_bytes(data)
    first, second = group(2).run(load_damaged, str(tmp_path), "r1-step-00000007")
    assert first.startswith("CheckpointDamagedError: rank 1: ") and second.startswith("CheckpointDamagedError: ")
    assert "model-00001.safetensors is damaged" in first and "model.sharded.weight" in second


def test_a_store_that_ranks_do_not_share_is_found_out(group: Group, tmp_path: Path) -> None:
    here, there = str(tmp_path / "here"), str(tmp_path / "there")
    assert group(2).run(look_whether_it_is_shared, [here, here]) == ["shared", "shared"]
    first, second = group(2).run(look_whether_it_is_shared, [here, there])
    for location, message in ((here, first), (there, second)):
        assert f"the store {location} is not shared" in message
        assert "rank 1 on " in message and "it does not find what was written" in message
    assert not list(ObjectStore.open(here).list())
