"""What a rank holds of a model: memory for its own parts, and where they lie in the whole tensors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

Box = tuple[slice, ...]
"""A part of a tensor: a range of each dim."""

Fill = Callable[[nn.Module], None]
"""Gives a model, or a stage of it, its values; of a tensor that is cut over ranks, this rank's part."""


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds; changing it in place changes the tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """Return a tensor whole, where it is; collective over the ranks that hold parts."""
    value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return value.detach()


def own_box(tensor: Tensor) -> Box:
    """Return where this rank's part lies in the whole tensor; ranges without length where it has none."""
    if not isinstance(tensor, DTensor):
        return tuple(slice(0, size) for size in tensor.shape)
    chunks: list[Any] = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return tuple(slice(o, o + n) for o, n in zip(chunks[0].offsets, tensor.to_local().shape, strict=True))


def materialize(model: nn.Module, device: torch.device | str) -> None:
    """Give every tensor on `meta` memory on a device, each rank for its part, and move the others there.

    Shared tensors stay shared; values of those that were on `meta` are undefined.
    """
    moved: dict[Tensor, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, tensor in list(held.items()):
                if tensor is not None:
                    if tensor not in moved:
                        moved[tensor] = _on(device, tensor)
                    held[name] = moved[tensor]  # type: ignore[assignment]


def skeleton_of(model: nn.Module) -> nn.Module:
    """Return a copy of a model on `meta`; shared parameters stay shared."""
    memo: dict[int, Any] = {
        id(tensor): nn.Parameter(tensor.to("meta"), requires_grad=tensor.requires_grad)
        if isinstance(tensor, nn.Parameter)
        else tensor.to("meta")
        for tensor in [*model.parameters(), *model.buffers()]
    }
    return copy.deepcopy(model, memo)


def _on(device: torch.device | str, tensor: Tensor) -> Tensor:
    if tensor.is_meta:
        data = torch.empty_like(tensor, device=device)
    elif isinstance(tensor, DTensor) or tensor.device == torch.empty(0, device=device).device:
        return tensor
    else:
        data = tensor.detach().to(device)
    return nn.Parameter(data, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
