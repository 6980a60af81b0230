"""The benchmarks of layouts: what they train, and what they make of what they measured."""

from __future__ import annotations

import pytest
from layouts import Case
from pipeline_bubble import SETTINGS, bubble_of_stages, stage_times

import gpu
from eagleray.config.crosschecks import layout_of
from eagleray.config.layout import parse_layout
from eagleray.parallel.timeline import Kind, Span
from eagleray_jobs.train.trace import ideal_bubble


@pytest.mark.parametrize("layout", ["ddp2", "fsdp4", "hsdp2x2", "fsdp2.tp2", "pp2.tp2"])
def test_a_case_is_a_file_of_its_layout(layout: str) -> None:
    config = Case(layout, 128, 2, 64, 10, parallel={"num_microbatches": 4}).config()
    assert layout_of(config) == parse_layout(layout)
    assert config.parallel.num_microbatches == 4


def test_the_bubble_of_unequal_stages_is_the_ideal_one_where_they_are_equal() -> None:
    for schedule, num_micro_batches, stages in SETTINGS:
        if stages == 1:
            assert bubble_of_stages([3.0, 3.0], num_micro_batches) == pytest.approx(
                ideal_bubble(2, num_micro_batches)
            ), schedule
    # Two micro-batches: 1 + 2 + 2 ms while 6 ms of the 10 are computed.
    assert bubble_of_stages([1.0, 2.0], 2) == pytest.approx(0.4)


def test_the_time_of_a_stage_is_of_all_its_passes() -> None:
    moments: list[tuple[Kind, int, int]] = [
        ("forward", 0, 1),
        ("backward", 3, 5),
        ("weights", 6, 7),
        ("clip", 8, 99),
    ]
    spans = [Span(kind, 6, start * 1_000_000, end * 1_000_000, 0, 0) for kind, start, end in moments]
    assert stage_times([spans], num_micro_batches=2) == [pytest.approx(2.0)]


def test_a_devices_peak_is_known_by_its_name_or_given() -> None:
    assert gpu.find_peak("NVIDIA H100 80GB HBM3", None) == 989.0
    assert gpu.find_peak("NVIDIA L40S", None) == 362.0
    assert gpu.find_peak("NVIDIA H100 80GB HBM3", 500.0) == 500.0
    assert gpu.find_peak("Other", None) is None
