"""How a rank's rows become micro-batches: as many on every rank, each row once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from eagleray.config.layout import Layout
from eagleray.parallel import DataCoordinate
from eagleray.tasks.base import Batch, Features, Processor, Task
from eagleray_jobs.data.cursor import Cursor
from eagleray_jobs.train.batches import Batches, Prefetch, StepBatch, cut_by_length, cut_evenly
from eagleray_jobs.train.loop import _pass_cost
from eagleray_jobs.train.spec import WorkerSpec


class Rows:
    def __init__(self, count: int) -> None:
        self.lengths = np.arange(count) + 1

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Features:
        return {"id": index}


class Collating:
    """The one method of a task that batches need."""

    def __init__(self, fails_at: int | None = None) -> None:
        self.fails_at = fails_at
        self.num_calls = 0

    def collate(self, rows: Sequence[Features], processor: Any) -> Batch:
        self.num_calls += 1
        if self.num_calls == self.fails_at:
            raise ValueError("cannot collate")
        return {"ids": torch.tensor([row["id"] for row in rows])}


def batches(
    rank: int,
    world: int,
    size: int,
    max_rows: int | None = None,
    task: Collating | None = None,
    pass_cost: int | None = None,
) -> Batches:
    rows = Rows(100)
    found = cast(Task, task or Collating())
    cursor, coordinate = Cursor(100, size, 0), DataCoordinate(rank, world)
    return Batches(cursor, rows, found, cast(Processor, None), coordinate, max_rows=max_rows, pass_cost=pass_cost)


def real_rows(step: StepBatch) -> list[int]:
    return [row for micro in step.micro_batches if not micro.filler for row in micro.batch["ids"].tolist()]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("size", [1, 4, 10, 64])
@pytest.mark.parametrize("max_rows", [None, 1, 3, 16])
@pytest.mark.parametrize("pass_cost", [None, 0, 30])
def test_every_row_is_in_one_micro_batch_of_one_rank(
    world: int, size: int, max_rows: int | None, pass_cost: int | None
) -> None:
    steps = [batches(rank, world, size, max_rows, pass_cost=pass_cost).load(2) for rank in range(world)]
    assert sorted(row for step in steps for row in real_rows(step)) == sorted(
        Cursor(100, size, 0).batch(1).tolist()
    )
    assert len({len(step.micro_batches) for step in steps}) == 1
    sizes = [len(micro.batch["ids"]) for step in steps for micro in step.micro_batches]
    assert min(sizes) >= 1 and max(sizes) <= (max_rows or size)


def test_a_rank_without_rows_borrows_one() -> None:
    fillers = [micro.filler for rank in range(3) for micro in batches(rank, 3, 2).load(1).micro_batches]
    assert sorted(fillers) == [False, False, True]


def test_counts_are_those_of_the_whole_global_batch() -> None:
    rows = Cursor(100, 10, 0).batch(0)
    for rank in range(2):
        step = batches(rank, 2, 10).load(1)
        assert (step.num_examples, step.num_tokens) == (10, int((rows + 1).sum()))


@pytest.mark.parametrize("max_rows, bounds", [(22, [0, 22]), (21, [0, 11, 22]), (8, [0, 7, 14, 22])])
def test_without_a_cost_there_are_as_few_passes_as_possible(max_rows: int, bounds: list[int]) -> None:
    assert cut_evenly(22, max_rows) == bounds


def cost(lengths: list[int], bounds: Sequence[int], pass_cost: int) -> int:
    return sum((end - start) * lengths[start] + pass_cost for start, end in pairwise(bounds))


def least_cost(lengths: list[int], max_rows: int, pass_cost: int) -> int:
    """By trying every cut."""
    places = range(1, len(lengths))
    tried = (
        [0, *chosen, len(lengths)] for number in range(len(lengths)) for chosen in combinations(places, number)
    )
    fitting = (bounds for bounds in tried if all(end - start <= max_rows for start, end in pairwise(bounds)))
    return min(cost(lengths, bounds, pass_cost) for bounds in fitting)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=9), st.integers(1, 9), st.sampled_from([0, 1, 5, 20, 100])
)
def test_rows_are_cut_where_it_costs_least(found: list[int], max_rows: int, pass_cost: int) -> None:
    lengths = sorted(found, reverse=True)
    bounds = cut_by_length(np.array(lengths, np.int32), max_rows, pass_cost)
    assert max(end - start for start, end in pairwise(bounds)) <= max_rows
    assert cost(lengths, bounds, pass_cost) == least_cost(lengths, max_rows, pass_cost)


def test_a_few_long_rows_get_a_pass_of_their_own() -> None:
    lengths = np.array([90] * 2 + [10] * 30)
    assert cut_by_length(lengths, 32, 64) == [0, 2, 32]
    assert cut_by_length(lengths, 32, 10_000) == [0, 32]


@pytest.mark.parametrize("max_rows", [1, 7, 4000])
def test_a_very_large_batch_is_cut_within_its_limit(max_rows: int) -> None:
    lengths = np.sort(np.random.default_rng(0).integers(1, 500, 20_000))[::-1]
    bounds = cut_by_length(lengths, max_rows, 64)
    assert (bounds[0], bounds[-1]) == (0, 20_000)
    assert 0 < max(end - start for start, end in pairwise(bounds)) <= max_rows


def test_all_ranks_cut_at_the_same_lengths() -> None:
    steps = [batches(rank, 3, 60, 20, pass_cost=30).load(1) for rank in range(3)]
    sizes = {tuple(len(micro.batch["ids"]) for micro in step.micro_batches) for step in steps}
    assert len(sizes) == 1 and len(sizes.pop()) > 1


def test_the_next_batch_is_collated_ahead_and_none_beyond_the_last_step() -> None:
    task = Collating()
    with closing(Prefetch(batches(0, 1, 10, task=task), 5, timeout_s=10)) as prefetch:
        steps = [_take_and_begin(prefetch, step) for step in (3, 4, 5)]
    assert [step.step for step in steps] == [3, 4, 5]
    assert task.num_calls == 3


def test_a_step_that_was_not_begun_is_collated_all_the_same() -> None:
    with closing(Prefetch(batches(0, 1, 10), 5, timeout_s=10)) as prefetch:
        prefetch.begin(4)
        assert [prefetch.take(step).step for step in (4, 5)] == [4, 5]


def _take_and_begin(prefetch: Prefetch, step: int) -> StepBatch:
    batch = prefetch.take(step)
    for _ in range(2):  # said twice it is begun once
        prefetch.begin(step + 1)
    return batch


def test_an_error_of_collation_reaches_the_loop_with_its_step() -> None:
    with closing(Prefetch(batches(0, 1, 10, task=Collating(fails_at=2)), 5, timeout_s=10)) as prefetch:
        assert _take_and_begin(prefetch, 1).step == 1
        with pytest.raises(ValueError, match="cannot collate"):
            prefetch.take(2)


def test_closing_early_ends_the_thread() -> None:
    import threading

    prefetch = Prefetch(batches(0, 1, 10), 1000, timeout_s=10)
    _take_and_begin(prefetch, 1)
    prefetch.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize(
    "layout, device, keys, cuts",
    [
        (Layout(), "cpu", {}, True),
        (Layout(replicate=2), "cpu", {}, True),
        (Layout(replicate=2), "cpu", {"cut_by_length": False}, False),
        (Layout(replicate=2), "cpu", {"torch_compile": True}, False),
        (Layout(replicate=2), "cuda", {}, False),
        (Layout(replicate=2, shard=2), "cpu", {}, False),
        (Layout(tensor=2), "cpu", {}, False),
        (Layout(pipeline=2), "cpu", {}, False),
    ],
)
def test_rows_are_cut_by_length_only_where_a_pass_more_costs_little(
    layout: Layout, device: str, keys: dict[str, Any], cuts: bool
) -> None:
    train = SimpleNamespace(**{"cut_by_length": True, "torch_compile": False, **keys})
    spec = cast(WorkerSpec, SimpleNamespace(layout=layout, train=train))
    assert (_pass_cost(spec, torch.device(device)) is not None) == cuts
