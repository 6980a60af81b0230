"""What `verify` compares: two trainings of the same file in two layouts, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Quantity = Literal["gradients", "norms", "losses", "parameters"]

_TINY = 1e-30
Optim = Literal["sgd", "adamw"]

MAX_GRADIENT_ERROR = 1e-5
"""Of a gradient, relative to its own norm: float32 sums in another order differ by about 1e-7 times the depth."""
MAX_ERROR: Mapping[Optim, float] = {"sgd": 1e-6, "adamw": 1e-5}
"""Of losses and parameters after the last step, relative to their scale."""
SMALL = 1e-3
"""A gradient, or a parameter, that is much smaller than the largest one of the model is compared relative to this
share of the largest: what is left of sums that cancel is rounding alone, and so is what it has moved."""
ROUNDING = 1e-6
"""What an element of a gradient may be wrong by, relative to the largest of its tensor. AdamW divides it by its
own size: where a gradient is nothing but rounding (the bias of keys, which attention does not feel) it makes whole
steps that no two orders of summation have in common. An element may differ by what AdamW makes of that."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What a few steps in a layout gave, whole, whatever the layout.

    Attributes:
        gradients: Of step 1 before clipping, by parameter name.
        norms: Of the whole gradient before clipping, of each step.
        losses: Over the global batch, of each step.
        parameters: After the last step, by name.
        distance: Sum of the learning rates: how far AdamW moves an element at most.
    """

    gradients: Mapping[str, Tensor]
    norms: Sequence[float]
    losses: Sequence[float]
    parameters: Mapping[str, Tensor]
    distance: float = 0.0


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


Errors = Mapping[Quantity, Mapping[str, float]]
"""Relative differences by kind of quantity and name; infinite where a value is missing or not finite."""


def compare(found: Trace, expected: Trace, optim: Optim) -> Comparison:
    """Compare a layout with one process."""
    return judge([measure(found, expected, optim)], names_of(expected), optim)


def names_of(trace: Trace) -> dict[Quantity, list[str]]:
    """Return what a trace holds, in the order of the model."""
    return {
        "gradients": list(trace.gradients),
        "norms": _steps(trace.norms),
        "losses": _steps(trace.losses),
        "parameters": list(trace.parameters),
    }


def measure(found: Trace, expected: Trace, optim: Optim) -> Errors:
    """Return how far each value is that `found` holds: a rank of a pipeline holds some of the tensors.

    Gradients come first because AdamW hides what is wrong with them: it is invariant to their scale, so that
    doubled gradients move its losses less than rounding does.
    """
    noise = _AdamWNoise(expected) if optim == "adamw" else None
    return {
        "gradients": _gradient_errors(found.gradients, expected.gradients),
        "norms": _number_errors(found.norms, expected.norms),
        "losses": _number_errors(found.losses, expected.losses),
        "parameters": _parameter_errors(found.parameters, expected.parameters, noise),
    }


def judge(ranks: Sequence[Errors], names: Mapping[Quantity, Sequence[str]], optim: Optim) -> Comparison:
    """Put the differences that ranks measured together and hold them against the bars.

    Args:
        ranks: What each rank measured of the values that it holds; the largest difference counts.
        names: What one process has: a name that no rank holds is missing.
        optim: The optimizer.
    """
    limits = limits_of(optim)
    errors: dict[Quantity, dict[str, float]] = {}
    for quantity in limits:
        measured = [rank[quantity] for rank in ranks]
        found = dict.fromkeys([*names[quantity], *(name for each in measured for name in each)])
        errors[quantity] = {
            name: max((each[name] for each in measured if name in each), default=float("inf")) for name in found
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


def limits_of(optim: Optim) -> dict[Quantity, float]:
    """Return the bar of each quantity."""
    return {
        "gradients": MAX_GRADIENT_ERROR,
        "norms": MAX_GRADIENT_ERROR,
        "losses": MAX_ERROR[optim],
        "parameters": MAX_ERROR[optim],
    }


class _AdamWNoise:
    """What AdamW makes of rounding, element by element.

    A gradient g with an error d changes an update by lr * d / sqrt(v), where sqrt(v) is hardly less than the g of
    the first step; no error changes it by more than two whole steps.
    """

    def __init__(self, expected: Trace) -> None:
        self._gradients = expected.gradients
        self._furthest = 2.0 * expected.distance
        self._smallest = SMALL * _largest(expected.gradients)

    def of(self, name: str) -> Tensor | float:
        """Return what the elements of a parameter may differ by."""
        gradient = self._gradients.get(name)
        if gradient is None or not gradient.numel():
            return 0.0
        sizes = gradient.double().abs()
        error = ROUNDING * max(float(sizes.max()), self._smallest)
        return self._furthest * (error / sizes.clamp(min=_TINY)).clamp(max=1.0)


def _gradient_errors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> dict[str, float]:
    floor = SMALL * max((float(value.norm()) for value in expected.values()), default=0.0)
    errors = {}
    for name, ours, theirs in _pairs(found, expected):
        errors[name] = float("inf")
        if theirs is not None:
            errors[name] = float((ours - theirs).norm()) / max(float(theirs.norm()), floor, _TINY)
    return errors


def _parameter_errors(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], noise: _AdamWNoise | None
) -> dict[str, float]:
    """Compare element by element: a wrong one must not hide behind the others."""
    floor = SMALL * _largest(expected)
    errors = {}
    for name, ours, theirs in _pairs(found, expected):
        errors[name] = float("inf")
        if theirs is not None:
            scale = max(float(theirs.abs().max()), floor, _TINY)
            allowed = 0.0 if noise is None else noise.of(name) / MAX_ERROR["adamw"]
            errors[name] = float(((ours - theirs).abs() / (scale + allowed)).max())
    return errors


def _pairs(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor, Tensor | None]]:
    """Yield what was found beside what was expected, in float64; None where the two cannot be compared."""
    for name, ours in found.items():
        theirs = expected.get(name)
        is_comparable = theirs is not None and ours.shape == theirs.shape and bool(torch.isfinite(ours).all())
        if theirs is None or not is_comparable:
            yield name, ours, None
        elif ours.numel():
            yield name, ours.double(), theirs.double()


def _largest(tensors: Mapping[str, Tensor]) -> float:
    sizes = [float(value.abs().max()) for value in tensors.values() if value.is_floating_point() and value.numel()]
    return max(sizes, default=0.0)


def _number_errors(found: Sequence[float], expected: Sequence[float]) -> dict[str, float]:
    known = dict(zip(_steps(expected), expected, strict=True))
    errors = {}
    for step, value in zip(_steps(found), found, strict=True):
        error = abs(value - known.get(step, float("nan")))
        errors[step] = error / max(abs(known[step]), _TINY) if error == error else float("inf")
    return errors


def _steps(values: Sequence[float]) -> list[str]:
    return [f"step {index + 1}" for index in range(len(values))]
