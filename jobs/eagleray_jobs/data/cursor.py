"""The order in which examples are seen: a pure function of (seed, epoch), without any number of workers.

A run is one endless sequence of example indices: a permutation of all examples for epoch 0, then one for epoch 1,
and so on. A position in it is the number of examples consumed, and the global batch of step `s` lies at positions
`[s * B, (s + 1) * B)`. So a batch may cross an epoch, nothing is dropped or repeated, and any step is found at
once, whatever ran before.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]

BATCHES_PER_MEGABATCH = 50
"""Batches that are sorted by length together: long enough for little padding, short enough to stay random."""


class Cursor:
    """Finds the examples of every global batch.

    Args:
        num_examples: Examples of the training split.
        global_batch_size: Examples of one optimizer step, over all workers.
        seed: Seed of the run; an epoch is shuffled by (seed, epoch).
        lengths: Tokens of each example, shape (num_examples,). When given, examples of similar length
            share a batch.
    """

    def __init__(
        self, num_examples: int, global_batch_size: int, seed: int, lengths: NDArray[np.integer] | None = None
    ) -> None:
        if num_examples < 1 or global_batch_size < 1:
            raise ValueError(f"num_examples {num_examples} and global_batch_size {global_batch_size} must be >= 1")
        if lengths is not None and len(lengths) != num_examples:
            raise ValueError(f"{len(lengths)} lengths for {num_examples} examples")
        self.num_examples = num_examples
        self.global_batch_size = global_batch_size
        self.seed = seed
        self.lengths = lengths
        # A batch touches at most two epochs unless it is larger than one.
        self._epoch_order = lru_cache(maxsize=2)(self._make_epoch_order)

    def batch(self, step: int) -> Indices:
        """Return the global batch that follows after `step` optimizer steps: step 0 is the first.

        Returns:
            Example indices, shape (global_batch_size,).
        """
        return self.take(step * self.global_batch_size, self.global_batch_size)

    def take(self, position: int, count: int) -> Indices:
        """Return the `count` examples that come after `position` consumed ones, across epochs if need be."""
        if position < 0 or count < 0:
            raise ValueError(f"position {position} and count {count} must be >= 0")
        parts, end = [np.empty(0, np.int64)], position + count
        while position < end:
            epoch, start = divmod(position, self.num_examples)
            part = self._epoch_order(epoch)[start : start + end - position]
            parts.append(part)
            position += len(part)
        return np.concatenate(parts)

    def epoch(self, step: int) -> float:
        """Return how many epochs are complete after `step` optimizer steps, as a fraction."""
        return step * self.global_batch_size / self.num_examples

    def _make_epoch_order(self, epoch: int) -> Indices:
        shuffled = _permutation(self.num_examples, self.seed, epoch)
        if self.lengths is None:
            return shuffled
        return self._grouped(shuffled, epoch)

    def _grouped(self, shuffled: Indices, epoch: int) -> Indices:
        """Sort megabatches of a permutation by length, cut them into batches and shuffle those.

        The cuts lie on the run's batch boundaries: the first rows of an epoch complete the batch that
        the epoch before left open, and stay in front; the last, incomplete batch stays at the end.
        """
        assert self.lengths is not None
        size = self.global_batch_size
        head = min(-epoch * self.num_examples % size, self.num_examples)
        num_batches = (self.num_examples - head) // size
        body = shuffled[head : head + num_batches * size].copy()
        for start in range(0, len(body), BATCHES_PER_MEGABATCH * size):
            rows = body[start : start + BATCHES_PER_MEGABATCH * size]
            rows[:] = rows[np.argsort(self.lengths[rows], kind="stable")]
        batches = body.reshape(num_batches, size)[_permutation(num_batches, self.seed, epoch, stream=1)]
        return np.concatenate([shuffled[:head], batches.reshape(-1), shuffled[head + len(body) :]])


def deal_rows(
    indices: Indices, lengths: NDArray[np.integer], data_rank: int, data_world: int
) -> tuple[Indices, NDArray[np.integer]]:
    """Return the rows of a global batch that belong to one data-parallel coordinate, from long to short.

    Ranks wait for each other at every step, so each should have as much to do as the others: the rows are sorted
    by length and dealt out, each deal beginning where the one before it ended. The shares cover the batch once and
    differ by at most one row, the shortest (64 rows over 3 are 21, 21 and 22).

    Args:
        indices: The global batch.
        lengths: Tokens of each of its rows; equal ones keep the order of the batch.
        data_rank: The coordinate, 0 .. data_world - 1.
        data_world: Number of coordinates.

    Returns:
        The rows, and the length of the longest row of each deal. The latter is the same for all coordinates; the
        last deal may have no row for this one.
    """
    if not 0 <= data_rank < data_world:
        raise ValueError(f"data_rank {data_rank} is outside of 0..{data_world - 1}")
    order = np.argsort(-lengths.astype(np.int64), kind="stable")
    deal, turn = np.divmod(np.arange(len(indices)), data_world)
    owner = np.where(deal % 2 == 0, turn, data_world - 1 - turn)
    return indices[order[owner == data_rank]], lengths[order[::data_world]]


def _permutation(size: int, seed: int, epoch: int, stream: int = 0) -> Indices:
    # NumPy guarantees the streams of its bit generators for ever, but not those of Generator.permutation
    # (NEP 19): sorting raw words keeps a run resumable under another version of NumPy.
    words = np.random.PCG64(np.random.SeedSequence([seed, epoch, stream])).random_raw(size)
    return np.argsort(words, kind="stable").astype(np.int64, copy=False)
