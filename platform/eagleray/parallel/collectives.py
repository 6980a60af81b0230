"""Collectives that gradients pass through; each is the other's derivative, pairwise.

Everything is made contiguous first: gloo returns wrong values for views, without an error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class _SumGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _all_reduce(gradient, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: dist.ProcessGroup) -> Tensor:
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dim: int, length: int, group: dist.ProcessGroup, partial_gradient: bool
    ) -> Tensor:
        ctx.dim, ctx.group, ctx.partial_gradient = dim, group, partial_gradient
        return _all_gather(x, dim, length, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        if ctx.partial_gradient:
            return _reduce_scatter(gradient, ctx.dim, ctx.group), None, None, None, None
        return _own_part(gradient, ctx.dim, ctx.group).contiguous(), None, None, None, None


class _ReduceScatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group, ctx.length = dim, group, x.shape[dim]
        return _reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradient, ctx.dim, ctx.length, ctx.group), None, None


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
        ctx.dim, ctx.group, ctx.length = dim, group, x.shape[dim]
        return _own_part(x, dim, group).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _all_gather(gradient, ctx.dim, ctx.length, ctx.group), None, None


class _ContiguousGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def contiguous_gradient(x: Tensor) -> Tensor:
    """Return `x`; its gradient is contiguous, as sending it needs."""
    return _ContiguousGradient.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def sum_gradient(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Return `x`; its gradient is summed over the group."""
    return _SumGradient.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def sum_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum `x` over the group; every rank's part gets the gradient of the sum."""
    return _Sum.apply(x, group)  # type: ignore[no-any-return, no-untyped-call]


def gather(x: Tensor, dim: int, length: int, group: dist.ProcessGroup, *, partial_gradient: bool) -> Tensor:
    """Put the parts of all ranks together along `dim`.

    Args:
        x: This rank's part, sized as by `torch.chunk`.
        dim: The dim that is cut.
        length: Size of the whole along `dim`.
        group: The ranks that hold the parts.
        partial_gradient: Whether each rank goes on with a different computation, so that the gradients of the
            whole are to be summed; otherwise they are equal.
    """
    return _Gather.apply(x, dim, length, group, partial_gradient)  # type: ignore[no-any-return, no-untyped-call]


def reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Sum `x` over the group and keep this rank's part along `dim`."""
    return _ReduceScatter.apply(x, dim, group)  # type: ignore[no-any-return, no-untyped-call]


def split(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    """Keep this rank's part of an `x` that is equal on all ranks."""
    return _Split.apply(x, dim, group)  # type: ignore[no-any-return, no-untyped-call]


def _all_reduce(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = x.contiguous().clone()
    dist.all_reduce(total, group=group)
    return total


def _own_part(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    size = _part_size(x.shape[dim], group)
    start = min(dist.get_rank(group) * size, x.shape[dim])
    return x.narrow(dim, start, min(size, x.shape[dim] - start))


def _all_gather(x: Tensor, dim: int, length: int, group: dist.ProcessGroup) -> Tensor:
    size, world = _part_size(length, group), dist.get_world_size(group)
    own = _pad(x, dim, size).movedim(dim, 0).contiguous()
    whole = own.new_empty((size * world, *own.shape[1:]))
    dist.all_gather_single(whole, own, group=group)
    return whole[:length].movedim(0, dim).contiguous()


def _reduce_scatter(x: Tensor, dim: int, group: dist.ProcessGroup) -> Tensor:
    length, size, world = x.shape[dim], _part_size(x.shape[dim], group), dist.get_world_size(group)
    whole = _pad(x, dim, size * world).movedim(dim, 0).contiguous()
    own = whole.new_empty((size, *whole.shape[1:]))
    dist.reduce_scatter_single(own, whole, group=group)
    start = min(dist.get_rank(group) * size, length)
    return own[: min(size, length - start)].movedim(0, dim).contiguous()


def _part_size(length: int, group: dist.ProcessGroup) -> int:
    return -(-length // dist.get_world_size(group))


def _pad(x: Tensor, dim: int, length: int) -> Tensor:
    missing = length - x.shape[dim]
    if not missing:
        return x
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)
