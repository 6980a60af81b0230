"""What `verify` compares: two trainings of the same file in two layouts, tensor by tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Quantity = Literal["gradients", "norms", "losses", "parameters"]

MAX_GRADIENT_ERROR = 1e-5
"""Of a gradient, relative to its own norm: float32 sums in another order differ by about 1e-7 times the depth."""
SMALL_GRADIENT = 1e-3
"""A gradient much smaller than the largest one is compared relative to this share of the largest: what is left of
sums that cancel (the bias of keys, which attention does not feel) is rounding alone."""
MAX_ERROR = {"sgd": 1e-6, "adamw": 1e-5}
"""Of losses and parameters after the last step, relative to their scale. AdamW divides a gradient by its own size,
so that a difference in the last bit of a gradient near zero becomes one of a whole step."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a few steps in a layout gave, whole, whatever the layout.

    Attributes:
        gradients: Of step 1 before clipping, by parameter name.
        norms: Of the whole gradient before clipping, of each step.
        losses: Over the global batch, of each step.
        parameters: After the last step, by name.
    """

    gradients: Mapping[str, Tensor]
    norms: Sequence[float]
    losses: Sequence[float]
    parameters: Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A quantity that is not what one process gives.

    Attributes:
        quantity: Kind of quantity.
        name: Of the tensor, or of the step.
        error: Largest relative difference; infinite if one of the two lacks it or is not finite.
        limit: The bar.
    """

    quantity: Quantity
    name: str
    error: float
    limit: float

    def __str__(self) -> str:
        return f"{self.quantity}: {self.name} differs by {self.error:.1e} (limit {self.limit:.0e})"


@dataclass(frozen=True, slots=True)
class Comparison:
    """How far a layout is from one process.

    Attributes:
        errors: Largest relative difference of each quantity.
        mismatches: What passes its bar, gradients first, in the order of the model.
    """

    errors: Mapping[Quantity, float]
    mismatches: Sequence[Mismatch]

    @property
    def passed(self) -> bool:
        """Whether the layout gives the same result."""
        return not self.mismatches


def compare(found: Trace, expected: Trace, optim: Literal["sgd", "adamw"]) -> Comparison:
    """Compare a layout with one process.

    Gradients come first because AdamW hides what is wrong with them: it is invariant to their scale, so that
    doubled gradients move its losses less than rounding does.
    """
    largest = max((float(value.norm()) for value in expected.gradients.values()), default=0.0)
    errors: dict[Quantity, dict[str, float]] = {
        "gradients": _tensor_errors(found.gradients, expected.gradients, SMALL_GRADIENT * largest),
        "norms": _number_errors(found.norms, expected.norms),
        "losses": _number_errors(found.losses, expected.losses),
        "parameters": _tensor_errors(found.parameters, expected.parameters, 0.0, elementwise=True),
    }
    limits: dict[Quantity, float] = {
        "gradients": MAX_GRADIENT_ERROR,
        "norms": MAX_GRADIENT_ERROR,
        "losses": MAX_ERROR[optim],
        "parameters": MAX_ERROR[optim],
    }
    mismatches = [
        Mismatch(quantity, name, error, limits[quantity])
        for quantity, values in errors.items()
        for name, error in values.items()
        if not error <= limits[quantity]
    ]
    return Comparison(
        {quantity: max(values.values(), default=0.0) for quantity, values in errors.items()}, mismatches
    )


def _tensor_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], floor: float, *, elementwise: bool = False
) -> dict[str, float]:
    errors = dict.fromkeys([*expected, *(name for name in found if name not in expected)], float("inf"))
    for name in expected.keys() & found.keys():
        ours, theirs = found[name].double(), expected[name].double()
        if ours.shape != theirs.shape or not bool(torch.isfinite(ours).all()):
            continue
        if elementwise:  # one wrong element must not hide behind the others
            error, scale = float((ours - theirs).abs().max()), float(theirs.abs().max())
        else:
            error, scale = float((ours - theirs).norm()), float(theirs.norm())
        errors[name] = 0.0 if error == 0.0 else error / max(scale, floor, 1e-30)
    return errors


def _number_errors(found: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    errors = {f"step {index + 1}": float("inf") for index in range(max(len(found), len(expected)))}
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=False)):
        error = abs(ours - theirs)
        errors[f"step {index + 1}"] = error / max(abs(theirs), 1e-30) if error == error else float("inf")
    return errors
