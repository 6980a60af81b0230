"""The groups of processes that the tests of this tier run on."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup, RanksFailed


def sum_of_ranks(offset: int) -> tuple[int, int, int]:
    total = torch.tensor([dist.get_rank() + offset])
    dist.all_reduce(total)
    return dist.get_rank(), int(total), torch.get_num_threads()


def fail_on(rank: int) -> int:
    if dist.get_rank() == rank:
        raise ValueError(f"rank {rank} fails")
    return os.getpid()


def die_on(rank: int) -> None:
    if dist.get_rank() == rank:
        os._exit(3)


def test_every_rank_answers_with_one_thread(group: Callable[[int], RankGroup]) -> None:
    assert group(2).run(sum_of_ranks, 10) == [(0, 21, 1), (1, 21, 1)]


def test_processes_live_from_call_to_call(group: Callable[[int], RankGroup]) -> None:
    assert group(2).run(fail_on, 5) == group(2).run(fail_on, 5)


def test_a_failing_rank_is_named_with_its_traceback_and_the_group_starts_anew() -> None:
    group = RankGroup(2)
    try:
        with pytest.raises(RanksFailed) as error:
            group.run(fail_on, 1)
        assert [failure.world_rank for failure in error.value.failures] == [1]
        assert "ValueError: rank 1 fails" in str(error.value)
        with pytest.raises(RanksFailed, match="exit status 3") as error:
            group.run(die_on, 0)
        assert str(error.value.as_error()).startswith("rank 0: the process ended with exit status 3\n")
        assert group.run(sum_of_ranks, 0)[0] == (0, 1, 1)
    finally:
        group.close()


def test_ranks_that_give_no_answer_in_time_are_no_dead_ones() -> None:
    late = "no answer within 264 s"
    error = RanksFailed((), {0: late, 1: late, 2: "the process ended with exit status 3"}).as_error()
    assert error.message == f"ranks 0, 1: {late}; rank 2: the process ended with exit status 3"
