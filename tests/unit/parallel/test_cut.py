"""A pipeline is cut so that its dearest stage is as cheap as possible."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel import ParallelOptions, check_supported
from eagleray.parallel.cut import balance, cut_layers, describe_cut
from eagleray.parallel.plan import ParallelPlan


@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(1, 4))
def test_no_other_cut_has_a_cheaper_dearest_stage(costs: list[int], num_stages: int) -> None:
    if len(costs) < num_stages:
        return
    found = balance(costs, num_stages)
    assert [index for part in found for index in part] == list(range(len(costs)))
    assert all(found)
    dearest = max(sum(costs[index] for index in part) for part in found)
    for inner in combinations(range(1, len(costs)), num_stages - 1):
        ends = [0, *inner, len(costs)]
        assert dearest <= max(sum(costs[a:b]) for a, b in pairwise(ends))


def test_a_dear_last_layer_gets_a_stage_of_its_own() -> None:
    assert cut_layers([1, 1, 1, 3], 2) == [range(3), range(3, 4)]


def test_the_file_decides_where_it_says_so() -> None:
    assert cut_layers([1, 1, 1, 3], 2, [1, 3]) == [range(1), range(1, 4)]


@pytest.mark.parametrize("split", [[2, 1], [4], [4, 0]])
def test_a_split_that_does_not_fit_is_refused(split: list[int]) -> None:
    with pytest.raises(ConfigError, match="give 2 numbers of at least 1, one for each stage, whose sum is the 4"):
        cut_layers([1, 1, 1, 1], 2, split)


def test_too_few_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="the model has 3 layers, too few for 4 pipeline stages"):
        cut_layers([1, 1, 1], 4)


def test_a_cut_is_described_by_its_layers_and_their_share_of_the_cost() -> None:
    model = nn.ModuleDict(
        {"encoder": nn.ModuleList(nn.Linear(4, 4) for _ in range(3)), "decoder": nn.ModuleList([nn.Linear(4, 20)])}
    )
    plan = ParallelPlan(layers=("encoder", "decoder"))
    assert describe_cut(model, plan, [range(2), range(2, 4)], length=8) == [
        "stage 0: encoder.0 to 1; 25% of the estimated cost",
        "stage 1: encoder.2, decoder.0; 75% of the estimated cost",
    ]


def test_a_global_batch_that_makes_no_equal_micro_batches_is_refused_with_the_numbers() -> None:
    layout, options = Layout(pipeline=2, replicate=3), ParallelOptions(num_microbatches=4)
    check_supported(layout, options, 36)
    with pytest.raises(ConfigError) as error:
        check_supported(layout, options, 64)
    assert str(error.value) == (
        "train.global_batch_size 64 over 3 data-parallel ranks does not make 4 equal micro-batches for the "
        "pipeline\n"
        "  use a multiple of 12, or change parallel.num_microbatches"
    )
