"""What the engine benchmark compares, what a run gives, and the tables that are made of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from copying_model import Size
from results_page import markdown_table

TOGETHER_TARGET, ALONE_TARGET = 1.5, 4.0

Decode = Callable[[Sequence[Sequence[int]]], list[list[int]]]
"""Sources to answers, the start token in front."""


NAMES = {
    "transformers": "transformers `generate`",
    "ctranslate2": "CTranslate2",
    "auto": "eagleray",
    "torch": "eagleray, `engine: torch`",
}


@dataclass(frozen=True, slots=True)
class Side:
    """One thing that is measured once per round."""

    engine: Literal["transformers", "ctranslate2", "auto", "torch"]
    dtype: Literal["float32", "bfloat16", "int8"]

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"{NAMES[self.engine]}, {self.dtype}"


FIRST = Side("transformers", "float32")
FOREIGN_INT8, INT8 = Side("ctranslate2", "int8"), Side("auto", "int8")
PEERS = (FIRST, Side("ctranslate2", "float32"), FOREIGN_INT8)
OURS = (
    Side("auto", "float32"), INT8,
    Side("torch", "float32"), Side("torch", "bfloat16"), Side("torch", "int8"),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        sizes: Models.
        threads: Numbers of threads.
        num_rounds: Rounds of all sides.
        num_rows: Rows that are decoded together.
        num_alone: Rows that are decoded one by one.
        longest: Tokens of the longest source.
        batch_sizes: What transformers may choose from.
        max_items: Rows that the others hold at once.
    """

    sizes: tuple[Size, ...] = (Size(128, 2, 2000), Size(256, 3, 8000))
    threads: tuple[int, ...] = (2, 1)
    num_rounds: int = 5
    num_rows: int = 256
    num_alone: int = 24
    longest: int = 44
    batch_sizes: tuple[int, ...] = (16, 32, 64, 128)
    max_items: int = 64


QUICK = Plan(
    sizes=(Size(128, 1, 500),),
    threads=(1,),
    num_rounds=1,
    num_rows=16,
    num_alone=2,
    longest=10,
    batch_sizes=(8, 16),
)


@dataclass(frozen=True, slots=True)
class Run:
    """What one run gave.

    Attributes:
        together: Generated tokens per second of all rows.
        alone: The same of rows one by one.
        right: Share of the answers that copy their source.
    """

    together: float
    alone: float
    right: float


Measured = Mapping[Side, list[Run]]
"""The runs of each side, one per round."""


def report(size: Size, num_threads: int, runs: Measured, best_batch_size: int) -> str:
    """Return the table of one model and one number of threads."""
    rows = [_line(side, runs, best_batch_size) for side in runs]
    threads = f"{num_threads} thread{'s' if num_threads > 1 else ''}"
    headers = [
        f"{size.name}; {threads}",
        "tokens/s",
        "to `generate`",
        "to CT2 int8",
        "one by one",
        "to `generate`",
    ]
    targets = ["target", "", f">= {TOGETHER_TARGET}", ">= 1 (int8)", "", f">= {ALONE_TARGET:g}"]
    return markdown_table([*headers, "right"], [*rows, [*targets, ""]])


def _line(side: Side, runs: Measured, best_batch_size: int) -> list[str]:
    together, alone = ([getattr(run, name) for run in runs[side]] for name in ("together", "alone"))
    name = f"{side.name}, sorted batches of {best_batch_size}" if side is FIRST else side.name
    foreign = f"{ratio(runs, side, FOREIGN_INT8, 'together'):.2f}" if FOREIGN_INT8 in runs else "not installed"
    return [
        name,
        f"{statistics.median(together):,.0f}",
        f"{ratio(runs, side, FIRST, 'together'):.2f}",
        foreign,
        f"{statistics.median(alone):,.0f}",
        f"{ratio(runs, side, FIRST, 'alone'):.2f}",
        f"{min(run.right for run in runs[side]):.1%}",
    ]


def ratio(runs: Measured, of: Side, to: Side, what: Literal["together", "alone"]) -> float:
    """Return the median over the rounds of the ratio of two speeds."""
    pairs = zip(runs[of], runs[to], strict=True)
    return statistics.median(getattr(one, what) / getattr(other, what) for one, other in pairs)
