"""What `verify` says at its end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from eagleray.console import table
from eagleray_jobs.verify.compare import Comparison, Optim, Quantity, limits_of

NUM_NAMED = 3
Verdict = Literal["same", "DIFFERENT", "FAILED"]


@dataclass(frozen=True, slots=True)
class LayoutResult:
    """What became of a layout.

    Attributes:
        layout: As it is spelled.
        comparison: How far it is from one process; None: its ranks raised.
        failure: What they raised.
        seconds: How long it took.
    """

    layout: str
    comparison: Comparison | None
    failure: str | None
    seconds: float

    @property
    def verdict(self) -> Verdict:
        """Whether the layout gives what one process gives."""
        if self.comparison is None:
            return "FAILED"
        return "same" if self.comparison.passed else "DIFFERENT"

    def row(self) -> list[str]:
        """Return the line of the table."""
        errors = self.comparison.errors if self.comparison else {}
        return [self.layout, *(_shown(errors.get(key)) for key in _QUANTITIES), self.verdict]

    def as_json(self) -> dict[str, Any]:
        """Return JSON, which has no infinity: such a difference is null."""
        errors = self.comparison.errors if self.comparison else {}
        mismatches = self.comparison.mismatches if self.comparison else ()
        return {
            "layout": self.layout,
            "verdict": self.verdict.lower(),
            "errors": {key: _finite(value) for key, value in errors.items()},
            "mismatches": [
                {"quantity": each.quantity, "name": each.name, "error": _finite(each.error), "limit": each.limit}
                for each in mismatches
            ],
            "failure": self.failure,
            "seconds": round(self.seconds, 2),
        }


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What became of a file.

    Attributes:
        name: Of the file's model.
        num_steps: Steps that were trained.
        global_batch_size: Examples of each.
        optim: The optimizer, which decides the bars.
        device: Where the ranks computed.
        results: Of the layouts, in the order in which they ran.
        refused: Why layouts that nobody named were left out.
        notes: What the check did otherwise than the file says.
        seconds: Of everything.
    """

    name: str
    num_steps: int
    global_batch_size: int
    optim: Optim
    device: str
    results: Sequence[LayoutResult]
    refused: Mapping[str, str] = field(default_factory=dict)
    notes: Sequence[str] = ()
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether every layout gives what one process gives."""
        return all(result.verdict == "same" for result in self.results)

    def text(self) -> str:
        """Return the table, what is wrong, and what was left out."""
        optim = {"sgd": "SGD", "adamw": "AdamW"}[self.optim]
        lines = [
            f"{self.name}: {self.num_steps} steps of {self.global_batch_size} examples with {optim} in float32 on "
            f"{self.device}, dropout off; largest relative difference from one process"
        ]
        bars = ["at most", *(f"{limits_of(self.optim)[key]:.0e}" for key in _QUANTITIES), ""]
        lines += ["", table(["layout", *_QUANTITIES, ""], [bars, *(result.row() for result in self.results)])]
        for result in self.results:
            lines += _wrong(result)
        lines += [f"not tried: {layout}: {why}" for layout, why in self.refused.items()]
        lines += self.notes
        num_same = sum(result.verdict == "same" for result in self.results)
        lines += [
            "",
            f"{num_same} of {len(self.results)} layouts give what one process gives ({self.seconds:.0f} s)",
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """Return JSON."""
        return {
            "name": self.name,
            "passed": self.passed,
            "num_steps": self.num_steps,
            "global_batch_size": self.global_batch_size,
            "optim": self.optim,
            "device": self.device,
            "limits": limits_of(self.optim),
            "layouts": [result.as_json() for result in self.results],
            "refused": dict(self.refused),
            "notes": list(self.notes),
            "seconds": round(self.seconds, 2),
        }


_QUANTITIES: tuple[Quantity, ...] = ("gradients", "norms", "losses", "parameters")


def _wrong(result: LayoutResult) -> list[str]:
    if result.comparison is None:
        return ["", f"{result.layout} failed: {result.failure}"]
    wrong = result.comparison.mismatches
    shown = [f"{result.layout}: {mismatch}" for mismatch in wrong[:NUM_NAMED]]
    if len(wrong) > NUM_NAMED:
        shown.append(f"{result.layout}: and {len(wrong) - NUM_NAMED} more")
    return shown


def _shown(error: float | None) -> str:
    return "-" if error is None else f"{error:.1e}"


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
