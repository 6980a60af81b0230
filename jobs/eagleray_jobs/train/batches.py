"""From the cursor to the micro-batches of one rank, one step ahead of the model."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from eagleray.parallel import DataCoordinate
from eagleray.scheduling import give_way
from eagleray.tasks.base import Batch, Features, Processor, Task
from eagleray_jobs.data.cursor import Cursor, deal_rows

MAX_PLACES = 512
"""Places that are tried for a cut between two micro-batches."""


class Rows(Protocol):
    """Prepared examples of one split, by index."""

    lengths: NDArray[np.integer]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Features: ...


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows of one forward pass.

    Attributes:
        batch: Collated rows, on the CPU.
        filler: The rank has no row left for this pass. It runs on borrowed rows, so that all ranks make the same
            collectives, and its loss is multiplied by zero.
    """

    batch: Batch
    filler: bool = False


@dataclass(frozen=True, slots=True)
class StepBatch:
    """This rank's share of one global batch.

    Attributes:
        step: The step that it is for, counted from 1.
        micro_batches: As many on every rank.
        num_examples: Examples of the whole global batch.
        num_tokens: Their tokens, without padding.
    """

    step: int
    micro_batches: Sequence[MicroBatch]
    num_examples: int
    num_tokens: int


class Batches:
    """Cuts and collates the global batches of a run for one rank.

    Args:
        cursor: The order of examples; knows no ranks.
        rows: The training split.
        task: Collates.
        processor: Of the task.
        coordinate: Which share of the global batch this rank reads.
        max_rows: Most rows in one micro-batch (`per_device_train_batch_size`); None: the share is one.
        pass_cost: What a pass costs beside its padded tokens, in tokens; rows are cut where that saves most. None:
            as few passes as possible, of equally many rows.
        pin_memory: Whether batches go to pinned memory, so that copies to a GPU are asynchronous.
    """

    def __init__(
        self,
        cursor: Cursor,
        rows: Rows,
        task: Task,
        processor: Processor,
        coordinate: DataCoordinate,
        *,
        max_rows: int | None = None,
        pass_cost: int | None = None,
        pin_memory: bool = False,
    ) -> None:
        self.cursor = cursor
        self._rows = rows
        self._task = task
        self._processor = processor
        self._coordinate = coordinate
        self._max_rows = max_rows
        self._pass_cost = pass_cost
        self._pin_memory = pin_memory

    def load(self, step: int) -> StepBatch:
        """Collate this rank's share of a step (counted from 1)."""
        batch = self.cursor.batch(step - 1)
        lengths = self._rows.lengths[batch]
        own, longest = deal_rows(batch, lengths, self._coordinate.rank, self._coordinate.world)
        # Every rank cuts at the same deals: all run as many passes, and each pass is as long on all of them.
        parts = [own[start:end] for start, end in pairwise(self._cut(longest))]
        micro_batches = [self._collate(part if len(part) else batch[:1], not len(part)) for part in parts]
        return StepBatch(step, micro_batches, len(batch), int(lengths.sum()))

    def _cut(self, longest: NDArray[np.integer]) -> list[int]:
        if self._max_rows is None:
            return [0, len(longest)]
        if self._pass_cost is None:
            return cut_evenly(len(longest), self._max_rows)
        return cut_by_length(longest, self._max_rows, self._pass_cost)

    def _collate(self, indices: NDArray[np.int64], filler: bool) -> MicroBatch:
        batch = self._task.collate([self._rows[int(index)] for index in indices], self._processor)
        if self._pin_memory:
            batch = {name: tensor.pin_memory() for name, tensor in batch.items()}
        return MicroBatch(batch, filler)


def cut_evenly(num_rows: int, max_rows: int) -> list[int]:
    """Return the bounds of as few parts as possible, which differ by at most one row."""
    num_parts = -(-num_rows // max_rows)
    return [part * num_rows // num_parts for part in range(num_parts + 1)]


def cut_by_length(lengths: NDArray[np.integer], max_rows: int, pass_cost: int) -> list[int]:
    """Return the bounds of the parts that cost least, each padded to its longest row.

    A part costs its rows times its longest one, and `pass_cost` besides. The cheapest cut is found by dynamic
    programming over where the last part begins.

    Args:
        lengths: Of the rows, from long to short, shape (N,).
        max_rows: Most rows in one part.
        pass_cost: In tokens.

    Returns:
        Bounds from 0 to N.
    """
    num_rows = len(lengths)
    # Few enough places to cut at that even a very large batch is cut within milliseconds.
    stride = min(max_rows, max(1, num_rows // MAX_PLACES))
    bounds = np.unique(np.append(np.arange(0, num_rows, stride), num_rows))
    firsts = lengths.astype(np.int64)[bounds[:-1]]
    costs = np.zeros(len(bounds))
    begins = np.zeros(len(bounds), np.int64)
    for end in range(1, len(bounds)):
        near = int(np.searchsorted(bounds, bounds[end] - max_rows))
        found = costs[near:end] + (bounds[end] - bounds[near:end]) * firsts[near:end] + pass_cost
        begins[end] = near + int(found.argmin())
        costs[end] = found.min()
    cut = [len(bounds) - 1]
    while cut[-1]:
        cut.append(int(begins[cut[-1]]))
    return [int(bounds[place]) for place in reversed(cut)]


class Prefetch:
    """Collates the batch of the next step in a thread while the model is busy with this one's.

    Args:
        batches: Of this rank.
        last_step: No step is collated after this one.
        timeout_s: Seconds after which a batch that is not ready is an error.
    """

    def __init__(self, batches: Batches, last_step: int, *, timeout_s: float) -> None:
        self._batches, self._last_step, self._timeout_s = batches, last_step, timeout_s
        # The thread must not interrupt the one that computes, in this process or in another one.
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=give_way)
        self._ahead: tuple[int, Future[StepBatch]] | None = None

    def begin(self, step: int) -> None:
        """Begin to collate a step; nothing to do after the last one."""
        if step <= self._last_step and (self._ahead is None or self._ahead[0] != step):
            self._ahead = step, self._pool.submit(self._batches.load, step)

    def take(self, step: int) -> StepBatch:
        """Return the batch of a step, which need not have been begun.

        Raises:
            TimeoutError: It was not ready in time.
        """
        self.begin(step)
        assert self._ahead is not None, f"there is no step {step}"
        (_, future), self._ahead = self._ahead, None
        return future.result(self._timeout_s)

    def close(self) -> None:
        """End the thread, after the batch that it is at."""
        self._pool.shutdown()
