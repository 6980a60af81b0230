"""What ranks hold is what ZeRO's formulas say, and what was estimated before there were ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from typing import Any

import pytest
from footprints import Held, update_once
from layouts import Data
from layouts_memory import STATE, measure
from ranks import RankGroup

from eagleray.config.layout import parse_layout
from eagleray.parallel import ParallelOptions

Groups = Callable[[int], RankGroup]
DEEP: dict[str, dict[str, Any]] = {
    "bert": {"hidden_size": 64, "num_hidden_layers": 8, "intermediate_size": 256},
    "marian": {"d_model": 64, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 256,
               "decoder_ffn_dim": 256},
    "own": {"width": 64, "inner": 128, "depth": 8},
}  # fmt: skip
LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2", "fsdp4", "hsdp2x2", "fsdp2.tp2", "pp2.fsdp2", "pp2.tp2", "pp2.ddp2")
QUICK_LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2", "hsdp2x2", "pp2.fsdp2")
SAMPLE = {*(("bert", layout) for layout in QUICK_LAYOUTS), ("marian", "pp2.tp2")}
CASES = [(family, layout) for family in DEEP for layout in LAYOUTS]


@pytest.mark.parametrize(
    "family, layout",
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES],
)
def test_a_rank_holds_what_the_formula_of_zero_says_and_what_was_estimated(
    group: Groups, family: str, layout: str
) -> None:
    degrees = parse_layout(layout)
    for held in group(degrees.num_workers).run(update_once, family, degrees, DEEP[family], ParallelOptions()):
        assert_close(held, tolerance=0.05)


@pytest.mark.parametrize(
    "family", ["marian", *(pytest.param(name, marks=pytest.mark.slow) for name in ("t5", "distilbert", "vit"))]
)
@pytest.mark.parametrize("layout", ["tp2", "pp2.tp2"])
def test_what_tensor_parallelism_leaves_whole_is_estimated_exactly(
    group: Groups, family: str, layout: str
) -> None:
    degrees = parse_layout(layout)
    for held in group(degrees.num_workers).run(update_once, family, degrees, {}, ParallelOptions()):
        assert astuple(held.measured)[:2] == astuple(held.estimated)[:2]


def test_two_stages_on_a_rank_are_counted_together(group: Groups) -> None:
    degrees, options = parse_layout("pp2"), ParallelOptions(schedule="Interleaved1F1B")
    for held in group(2).run(update_once, "marian", degrees, DEEP["marian"], options):
        assert astuple(held.measured)[:2] == astuple(held.estimated)[:2]
        assert_close(held, tolerance=0.05)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_peak_of_whoever_holds_a_part_is_well_below_that_of_whoever_holds_all() -> None:
    data = Data.prepare()
    peaks = {
        layout: measure(replace(STATE, layout=layout), data).peak for layout in ("ddp2", "fsdp2", "tp2", "pp2")
    }
    whole = peaks.pop("ddp2")
    assert max(peaks.values()) < 0.8 * whole, peaks | {"ddp2": whole}


def assert_close(held: Held, tolerance: float) -> None:
    for measured, estimated, formula in zip(
        astuple(held.measured), astuple(held.estimated), astuple(held.formula), strict=True
    ):
        assert measured == pytest.approx(estimated, rel=tolerance)
        assert measured == pytest.approx(formula, rel=tolerance)
    assert held.measured.total == pytest.approx(held.formula.total, rel=tolerance)
