"""Norm and scale of gradients whose parts lie on several ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from eagleray.parallel.local import local


def local_gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Return the gradients' parts that this rank holds; changing one in place changes the gradient."""
    return [local(parameter.grad) for parameter in parameters if parameter.grad is not None]


@torch.no_grad()
def gradient_norm(parameters: Iterable[nn.Parameter], pipeline: dist.ProcessGroup | None = None) -> Tensor:
    """Return the 2-norm of the whole gradient, equal on all ranks, shape ().

    Args:
        parameters: Those of this rank; each part of a gradient counts once, however many ranks hold a copy of it.
        pipeline: The ranks whose stages hold other parameters; None without a pipeline.
    """
    parts: dict[tuple[DeviceMesh | None, tuple[int, ...]], list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        if parameter.grad is not None:
            parts[_cut_axes(parameter.grad)].append(local(parameter.grad))
    total = torch.zeros((), dtype=torch.float64)
    for (mesh, axes), gradients in parts.items():
        squares = _sum_of_squares(gradients)
        if mesh is not None:
            squares = squares.to(mesh.device_type)  # offloaded gradients are on the host, collectives are not
        for axis in axes:
            assert mesh is not None
            dist.all_reduce(squares, group=mesh.get_group(axis))
        total = total.to(squares.device) + squares
    if pipeline is not None:
        dist.all_reduce(total, group=pipeline)
    return total.sqrt().float()


@torch.no_grad()
def whole_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the gradients as whole tensors on the CPU, copied; collective over the ranks that hold parts."""
    return {name: whole(p.grad) for name, p in parameters.items() if p.grad is not None}


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whole, on the CPU, copied; collective over the ranks that hold parts."""
    value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value.detach().to("cpu", copy=True)


def _sum_of_squares(gradients: list[Tensor]) -> Tensor:
    """Return the sum of the squares of all elements, shape (), float64.

    On a CPU torch adds up a whole float32 tensor in float32: the norm of an embedding's gradient was wrong by
    1e-5, and by something else in each layout. So rows are added up in float32 and the rest in float64, all
    tensors together: one after the other they took four times as long. A GPU adds up as a tree.
    """
    if gradients[0].device.type != "cpu":
        return torch.stack(torch._foreach_norm(gradients)).double().square().sum()
    rows = [g.reshape(-1) if g.ndim < 2 else torch.linalg.vector_norm(g, dim=-1).reshape(-1) for g in gradients]
    return torch.cat(rows).double().square().sum()


def _cut_axes(gradient: Tensor) -> tuple[DeviceMesh | None, tuple[int, ...]]:
    if not isinstance(gradient, DTensor):
        return None, ()
    assert not any(placement.is_partial() for placement in gradient.placements), "every gradient is reduced"
    cut = [axis for axis, placement in enumerate(gradient.placements) if not placement.is_replicate()]
    return gradient.device_mesh, tuple(cut)
