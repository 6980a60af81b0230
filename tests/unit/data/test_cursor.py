from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from eagleray_jobs.data.cursor import Cursor, deal_rows

SIZES = st.integers(1, 300)
BATCHES = st.integers(1, 70)
SEEDS = st.integers(0, 2**32 - 1)


def lengths_of(num_examples: int) -> np.ndarray:
    return np.random.default_rng(0).integers(1, 100, num_examples)


@settings(max_examples=60, deadline=None)
@given(SIZES, BATCHES, SEEDS, st.booleans())
def test_every_epoch_sees_every_example_exactly_once(size: int, batch: int, seed: int, grouped: bool) -> None:
    cursor = Cursor(size, batch, seed, lengths_of(size) if grouped else None)
    num_steps = -(-3 * size // batch)
    seen = np.concatenate([cursor.batch(step) for step in range(num_steps)])[: 3 * size]
    for epoch in seen.reshape(3, size):
        assert sorted(epoch) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(SIZES, BATCHES, SEEDS, st.booleans(), st.integers(0, 40))
def test_a_batch_is_found_without_the_ones_before_it(
    size: int, batch: int, seed: int, grouped: bool, step: int
) -> None:
    lengths = lengths_of(size) if grouped else None
    walked = Cursor(size, batch, seed, lengths)
    for earlier in range(step):
        walked.batch(earlier)
    assert (Cursor(size, batch, seed, lengths).batch(step) == walked.batch(step)).all()


@settings(max_examples=60, deadline=None)
@given(SIZES, BATCHES, st.integers(1, 9))
def test_shares_of_any_number_of_workers_are_the_same_batch(size: int, batch: int, data_world: int) -> None:
    rows, lengths = Cursor(size, batch, seed=1).batch(3), lengths_of(size)
    shares = [deal_rows(rows, lengths[rows], rank, data_world)[0] for rank in range(data_world)]
    assert sorted(np.concatenate(shares).tolist()) == sorted(rows.tolist())
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert all((np.diff(lengths[share]) <= 0).all() for share in shares)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=80), st.integers(1, 9))
def test_no_worker_has_more_to_do_than_another_by_more_than_the_longest_row(
    found: list[int], data_world: int
) -> None:
    lengths = np.array(found)
    rows = np.arange(len(lengths))
    work = [int(lengths[deal_rows(rows, lengths, rank, data_world)[0]].sum()) for rank in range(data_world)]
    assert max(work) - min(work) <= max(found)


def test_rows_are_dealt_to_and_fro_from_the_longest() -> None:
    lengths = np.array([5, 9, 1, 7, 3, 8, 2])
    shares, longest = zip(*(deal_rows(np.arange(7), lengths, rank, 3) for rank in range(3)), strict=True)
    assert [lengths[share].tolist() for share in shares] == [[9, 2, 1], [8, 3], [7, 5]]
    assert [each.tolist() for each in longest] == [[9, 5, 1]] * 3


def test_epochs_and_seeds_give_different_orders() -> None:
    cursor = Cursor(100, 100, seed=0)
    orders = [cursor.batch(0), cursor.batch(1), Cursor(100, 100, seed=1).batch(0)]
    assert len({tuple(order) for order in orders}) == 3


def test_the_order_is_the_same_in_every_version() -> None:
    # Made by this test when it was written: a run must find its order again after an upgrade.
    assert Cursor(10, 10, seed=42).batch(0).tolist() == [4, 8, 1, 9, 3, 6, 0, 7, 2, 5]


@pytest.mark.parametrize("step", [0, 7, 31, 60])
def test_grouping_puts_similar_lengths_into_one_batch(step: int) -> None:
    lengths = lengths_of(2000)
    plain, grouped = Cursor(2000, 32, seed=3), Cursor(2000, 32, seed=3, lengths=lengths)
    assert np.ptp(lengths[grouped.batch(step)]) < 15 < np.ptp(lengths[plain.batch(step)])


def test_grouping_stays_on_batch_boundaries_in_later_epochs() -> None:
    lengths = lengths_of(2000)
    cursor = Cursor(2000, 32, seed=3, lengths=lengths)
    spreads = [np.ptp(lengths[cursor.batch(step)]) for step in range(63, 125)]
    assert max(spreads) < 15


def test_a_batch_larger_than_the_data_runs_through_several_epochs() -> None:
    assert np.bincount(Cursor(5, 12, seed=0).take(0, 15)).tolist() == [3] * 5


@pytest.mark.parametrize("rank, world", [(-1, 2), (2, 2), (0, 0)])
def test_a_rank_outside_of_the_world_is_refused(rank: int, world: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        deal_rows(np.arange(4), np.ones(4, int), rank, world)
