"""The comparison behind `verify` passes rounding and fails on every fault, also where AdamW hides it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray_jobs.verify.compare import Trace, compare

Gradients = dict[str, Tensor]
ROWS, STEPS = 8, 5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(6, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)
    )


def slices(step: int) -> list[tuple[Tensor, Tensor]]:
    """Two ranks' rows; their numbers of counted items differ."""
    draw = torch.Generator().manual_seed(step)
    x, y = torch.randn(ROWS, 6, generator=draw), torch.randint(0, 4, (ROWS,), generator=draw)
    y[:3] = -100
    return list(zip(x.chunk(2), y.chunk(2), strict=True))


class Fault:
    """A correct exchange of gradients between two ranks; subclasses break one part of it."""

    def rows(self, parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return parts

    def counts(self, counts: list[int]) -> list[float]:
        return [float(sum(counts))] * 2

    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return parts[0] + parts[1]


class Doubled(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return 2 * super().reduce(name, parts)


class OneDoubled(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return super().reduce(name, parts) * (2 if name == "3.weight" else 1)


class DividedByWorld(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return super().reduce(name, parts) / 2


class MissingOnOneRank(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return parts[0] if name == "5.weight" else super().reduce(name, parts)


class NormsReducedTwice(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return super().reduce(name, parts) * (2 if name.startswith("1.") else 1)


class BiasesReducedTwice(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return super().reduce(name, parts) * (2 if name.endswith("bias") else 1)


class LayerHalved(Fault):
    def reduce(self, name: str, parts: list[Tensor]) -> Tensor:
        return super().reduce(name, parts) * (0.5 if name.startswith("3.") else 1)


class SliceRepeated(Fault):
    def rows(self, parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [parts[0], parts[0]]


class LocalCount(Fault):
    def counts(self, counts: list[int]) -> list[float]:
        return [2.0 * max(count, 1) for count in counts]


class MicroBatchDropped(Fault):
    def rows(self, parts: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        return [parts[0], (parts[1][0][:2], parts[1][1][:2])]


FAULTS: list[type[Fault]] = [
    Doubled,
    OneDoubled,
    DividedByWorld,
    MissingOnOneRank,
    NormsReducedTwice,
    BiasesReducedTwice,
    LayerHalved,
    SliceRepeated,
    LocalCount,
    MicroBatchDropped,
]


def trace(optim: str, exchange: Fault | None) -> Trace:
    """Train in one process, or as two ranks whose gradients `exchange` puts together."""
    model = make_model()
    parameters = dict(model.named_parameters())
    make: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW if optim == "adamw" else torch.optim.SGD
    optimizer = make(parameters.values(), lr=1e-3)
    first, norms, losses = dict[str, Tensor](), list[float](), list[float]()
    for step in range(STEPS):
        gradients, loss = _gradients(model, parameters, slices(step), exchange)
        first = first or gradients
        norms.append(float(torch.stack([value.norm() for value in gradients.values()]).norm()))
        losses.append(loss)
        for name, parameter in parameters.items():
            parameter.grad = gradients[name].clone()
        optimizer.step()
    after = {name: value.detach().clone() for name, value in parameters.items()}
    return Trace(first, norms, losses, after, distance=1e-3 * STEPS)


def _gradients(
    model: nn.Module, parameters: Gradients, parts: list[tuple[Tensor, Tensor]], exchange: Fault | None
) -> tuple[Gradients, float]:
    if exchange is None:
        parts = [(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))]
    else:
        parts = exchange.rows(parts)
    own = [int((y >= 0).sum()) for _, y in parts]
    counts = [float(own[0])] if exchange is None else exchange.counts(own)
    found, total = [], 0.0
    for (x, y), count in zip(parts, counts, strict=True):
        loss = F.cross_entropy(model(x), y, reduction="sum") / count
        found.append(torch.autograd.grad(loss, list(parameters.values())))
        total += float(loss.detach())
    if exchange is None:
        return dict(zip(parameters, found[0], strict=True)), total
    return {name: exchange.reduce(name, [f[i] for f in found]) for i, name in enumerate(parameters)}, total


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_rounding_passes(optim: str) -> None:
    result = compare(trace(optim, Fault()), trace(optim, None), optim)  # type: ignore[arg-type]
    assert result.passed, result.mismatches


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_found(fault: type[Fault], optim: str) -> None:
    result = compare(trace(optim, fault()), trace(optim, None), optim)  # type: ignore[arg-type]
    assert not result.passed
    assert result.mismatches[0].quantity == "gradients"


def test_adamw_hides_doubled_gradients_from_losses_and_parameters() -> None:
    result = compare(trace("adamw", Doubled()), trace("adamw", None), "adamw")
    assert {mismatch.quantity for mismatch in result.mismatches} == {"gradients", "norms"}


def test_a_fault_in_one_tensor_names_that_tensor_first() -> None:
    result = compare(trace("sgd", OneDoubled()), trace("sgd", None), "sgd")
    assert str(result.mismatches[0]) == "gradients: 3.weight differs by 1.0e+00 (limit 1e-05)"


def test_a_missing_tensor_and_a_value_that_is_not_finite_are_mismatches() -> None:
    honest = trace("sgd", None)
    lost = Trace(
        {n: g for n, g in honest.gradients.items() if n != "5.bias"}, honest.norms, honest.losses[:-1], {}
    )
    assert {(m.quantity, m.name) for m in compare(lost, honest, "sgd").mismatches} >= {
        ("gradients", "5.bias"),
        ("losses", "step 5"),
        ("parameters", "0.weight"),
    }
    spoilt = Trace(honest.gradients, [float("nan"), *honest.norms[1:]], honest.losses, honest.parameters)
    assert [m.name for m in compare(spoilt, honest, "sgd").mismatches] == ["step 1"]


@pytest.mark.parametrize("optim", ["sgd", "adamw"])
def test_an_update_that_is_missing_in_one_tensor_is_found_where_gradients_are_right(optim: str) -> None:
    honest = trace(optim, None)
    kept = {name: value.detach() for name, value in make_model().named_parameters()}
    forgot = replace(honest, parameters={**honest.parameters, "3.bias": kept["3.bias"]})
    assert [m.name for m in compare(forgot, honest, optim).mismatches] == ["3.bias"]  # type: ignore[arg-type]


def test_what_adamw_makes_of_rounding_is_no_difference_but_more_than_it_can_move_is() -> None:
    honest = trace("adamw", None)
    gradient, value = honest.gradients["3.bias"].clone(), honest.parameters["3.bias"].clone()
    gradient[0] = 1e-12  # sums that cancel: the sign of what is left is an accident
    expected = replace(honest, gradients={**honest.gradients, "3.bias": gradient})
    for moved, passes in ((1e-3, True), (1e-1, False)):
        other = value.clone()
        other[0] += moved
        found = replace(expected, parameters={**honest.parameters, "3.bias": other})
        assert compare(found, expected, "adamw").passed is passes
