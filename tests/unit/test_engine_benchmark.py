"""What the benchmark of the translation engine computes; measuring itself is not a test."""

from __future__ import annotations

from pathlib import Path

import pytest
from copying_model import EOS, Size, copying_model, sources
from engine import CTranslate2, Transformers, measure, strip
from engine_results import FIRST, FOREIGN_INT8, INT8, Run, ratio, report

from eagleray.engine.options import DecodingOptions

BENCHMARKS_PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
SIZE = Size(width=128, num_layers=1, vocab_size=200)


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    runs = {
        FIRST: [Run(10, 1, 1), Run(20, 1, 1), Run(10, 2, 1)],
        INT8: [Run(30, 4, 1), Run(30, 6, 1), Run(20, 8, 1)],
    }
    assert ratio(runs, INT8, FIRST, "together") == 2
    assert ratio(runs, INT8, FIRST, "alone") == 4


def test_the_table_has_a_line_per_side_and_says_what_is_not_installed() -> None:
    runs = {FIRST: [Run(1000, 100, 1.0)], INT8: [Run(4000, 500, 0.99)]}
    first, _, *lines = report(SIZE, 2, runs, 64).splitlines()
    assert "width 128, 1 + 1 layers, 200 tokens; 2 threads" in first
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["transformers `generate`, float32, sorted batches of 64", "1,000", "1.00", "not installed",
                        "100", "1.00", "100.0%"]  # fmt: skip
    assert cells[1] == ["eagleray, int8", "4,000", "4.00", "not installed", "500", "5.00", "99.0%"]
    with_peer = report(SIZE, 1, {**runs, FOREIGN_INT8: [Run(2000, 1, 1)]}, 64)
    assert "not installed" not in with_peer


def test_transformers_copies_in_batches_of_any_size() -> None:
    rows, options = sources(SIZE, 9, longest=12), DecodingOptions(max_new_tokens=24)
    assert {row[-1] for row in rows} == {EOS} and len({len(row) for row in rows}) > 3
    for size in (1, 4):
        speed, right = measure(Transformers(copying_model(SIZE, 12), options, size), [rows])
        assert speed > 0 and right == 1.0
    assert strip([1, 5, 1, 1]) == [1, 5]


def test_ctranslate2_alone_copies_what_it_is_given_at_once() -> None:
    pytest.importorskip("ctranslate2", reason="pip install 'eagleray[ctranslate2]'")
    decode = CTranslate2(copying_model(SIZE, 12), "float32", DecodingOptions(max_new_tokens=24), 4)
    assert measure(decode, [sources(SIZE, 9, longest=12)])[1] == 1.0


def test_the_page_has_the_section() -> None:
    text = BENCHMARKS_PAGE.read_text()
    assert text.count("<!-- engine:begin -->") == text.count("<!-- engine:end -->") == 1
