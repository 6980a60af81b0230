"""Degrees become a layout, or an error with the equation."""

from __future__ import annotations

import pytest

from eagleray.config.layout import Layout, parse_layout, resolve_layout
from eagleray.config.schema import ParallelConfig
from eagleray.errors import ConfigError


def parallel(replicate: object = 1, shard: object = 1, tensor: object = 1, pipeline: object = 1) -> ParallelConfig:
    return ParallelConfig.model_validate(
        {
            "data_parallel_replicate_degree": replicate,
            "data_parallel_shard_degree": shard,
            "tensor_parallel_degree": tensor,
            "pipeline_parallel_degree": pipeline,
        }
    )


@pytest.mark.parametrize(
    "layout, spelling",
    [
        (Layout(), "single"),
        (Layout(replicate=2), "ddp2"),
        (Layout(shard=2, tensor=2), "fsdp2.tp2"),
        (Layout(replicate=2, shard=2), "hsdp2x2"),
        (Layout(pipeline=2, tensor=2), "pp2.tp2"),
        (Layout(replicate=2, tensor=2, pipeline=2), "pp2.ddp2.tp2"),
    ],
)
def test_a_layout_is_spelled_from_the_outermost_axis_inwards(layout: Layout, spelling: str) -> None:
    assert str(layout) == spelling


def test_the_number_of_workers_is_the_product_of_the_degrees() -> None:
    layout = resolve_layout(parallel(replicate=2, shard=3, tensor=2), None)
    assert layout == Layout(2, 3, 2, 1)
    assert (layout.num_workers, layout.num_data_ranks) == (12, 6)


def test_one_auto_takes_what_the_other_degrees_leave() -> None:
    assert resolve_layout(parallel(replicate="auto", tensor=2), 6) == Layout(replicate=3, tensor=2)


@pytest.mark.parametrize(
    "degrees, num_workers, message",
    [
        (
            parallel(replicate=2, tensor=2, pipeline=2),
            6,
            "2 (replicate) x 2 (tensor) x 2 (pipeline) = 8, but num_workers is 6",
        ),
        (parallel(), 2, "1 (replicate) = 1, but num_workers is 2"),
        (
            parallel(shard="auto", tensor=2),
            3,
            "2 (tensor) = 2, which does not divide num_workers 3; parallel.data_parallel_shard_degree is auto",
        ),
        (parallel(shard="auto", tensor=4), 2, "4 (tensor) = 4, which does not divide num_workers 2"),
        (parallel(replicate="auto"), None, "and so is resources.num_workers"),
        (
            parallel(replicate="auto", shard="auto"),
            4,
            "parallel.data_parallel_replicate_degree and parallel.data_parallel_shard_degree are all auto",
        ),
    ],
)
def test_degrees_that_do_not_fit_print_the_equation(
    degrees: ParallelConfig, num_workers: int | None, message: str
) -> None:
    with pytest.raises(ConfigError) as error:
        resolve_layout(degrees, num_workers)
    assert message in error.value.message
    assert error.value.exit_code == 2


@pytest.mark.parametrize(
    "layout",
    [Layout(), Layout(replicate=2), Layout(shard=4), Layout(2, 2), Layout(shard=2, tensor=2), Layout(2, 3, 4, 5)],
    ids=str,
)
def test_what_is_spelled_is_read_again(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout


def test_the_order_of_axes_does_not_matter() -> None:
    assert parse_layout("tp2.pp2") == Layout(tensor=2, pipeline=2)


@pytest.mark.parametrize(
    "text", ["", "tp", "tp0", "tp2.", "tp-2", "hsdp2", "cp2", "tp2.tp2", "ddp2.hsdp2x2", "tp02"]
)
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="spell it like ddp2"):
        parse_layout(text)
