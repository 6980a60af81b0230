"""How a rank's rows become micro-batches: as many on every rank, each row once."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any, cast

import numpy as np
import pytest
import torch

from eagleray.parallel import DataCoordinate
from eagleray.tasks.base import Batch, Features, Processor, Task
from eagleray_jobs.data.cursor import Cursor
from eagleray_jobs.train.batches import Batches, Prefetch, StepBatch, num_micro_batches


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
    rank: int, world: int, size: int, max_rows: int | None = None, task: Collating | None = None
) -> Batches:
    rows = Rows(100)
    found = cast(Task, task or Collating())
    cursor, coordinate = Cursor(100, size, 0), DataCoordinate(rank, world)
    return Batches(cursor, rows, found, cast(Processor, None), coordinate, max_rows=max_rows)


def real_rows(step: StepBatch) -> list[int]:
    return [row for micro in step.micro_batches if not micro.filler for row in micro.batch["ids"].tolist()]


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("size", [1, 4, 10, 64])
@pytest.mark.parametrize("max_rows", [None, 1, 3, 16])
def test_every_row_is_in_one_micro_batch_of_one_rank(world: int, size: int, max_rows: int | None) -> None:
    steps = [batches(rank, world, size, max_rows).load(2) for rank in range(world)]
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


def test_accumulation_is_what_the_largest_slice_needs() -> None:
    assert num_micro_batches(22, None) == 1
    assert num_micro_batches(22, 22) == 1
    assert num_micro_batches(22, 21) == 2
    assert num_micro_batches(22, 1) == 22


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
