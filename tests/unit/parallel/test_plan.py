"""A plan that does not fit its model or its degree is refused with the numbers."""

from __future__ import annotations

import pytest
from torch import nn

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel.plan import ParallelPlan, check_styles, check_tensor_plan

PLAN = ParallelPlan(
    layers=("blocks",), tensor={"blocks.*.up": "colwise", "blocks.*.down": "rowwise"}, divisible={"hidden": 6}
)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])


def test_the_first_pattern_that_matches_gives_the_style() -> None:
    assert PLAN.style("blocks.1.down") == "rowwise"
    assert PLAN.style("blocks.1") is None


def test_layers_come_with_their_names_in_order() -> None:
    assert [name for name, _ in PLAN.named_layers(Model())] == ["blocks.0", "blocks.1"]


@pytest.mark.parametrize(
    "plan, sequence_parallel, message",
    [
        (ParallelPlan(), False, "tensor_parallel_degree is 4, but the model has no tensor-parallel plan"),
        (ParallelPlan(no_tensor="its convolutions have none"), False, "is 4, but its convolutions have none"),
        (PLAN, False, "tensor_parallel_degree 4 does not divide hidden 6\n  degrees that fit: 1, 2, 3, 6"),
        (ParallelPlan(tensor=PLAN.tensor), True, "sequence_parallel: the model's plan does not allow it"),
    ],
)
def test_a_degree_that_the_model_does_not_allow_is_refused(
    plan: ParallelPlan, sequence_parallel: bool, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_tensor_plan(plan, Layout(tensor=4), sequence_parallel=sequence_parallel)
    assert message in str(error.value)


def test_sequence_parallel_needs_tensor_parallel() -> None:
    with pytest.raises(ConfigError, match=r"needs parallel.tensor_parallel_degree above 1"):
        check_tensor_plan(PLAN, Layout(shard=2), sequence_parallel=True)


@pytest.mark.parametrize(
    "plan, message",
    [
        (ParallelPlan(tensor={"blocks.*.upp": "colwise"}), "'blocks.*.upp' matches no module of Model"),
        (ParallelPlan(tensor={"blocks.*.up": "columns"}), "the style 'columns'"),  # type: ignore[dict-item]
    ],
)
def test_a_misspelt_plan_is_refused(plan: ParallelPlan, message: str) -> None:
    with pytest.raises(ConfigError) as error:
        check_styles(Model(), plan)
    assert message in str(error.value)


def test_layers_that_are_no_list_are_refused() -> None:
    with pytest.raises(ConfigError, match="names the layers 'layers': Model has no list"):
        list(ParallelPlan(layers=("layers",)).named_layers(Model()))
