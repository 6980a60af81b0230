"""This rank's part of a model that a layout has cut, as a network."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from eagleray.engine.decoder.families import Parts, join
from eagleray.engine.decoder.linear import Linear, Precision
from eagleray.engine.decoder.network import Lookup
from eagleray.parallel.local import local, own_box
from eagleray.parallel.remnants import Absent, Remnant


class CutParts(Parts):
    """Takes over this rank's part of modules that tensor parallelism has cut, or that a stage was left with.

    The model was checked before it was cut: hooks and forward passes that stand there now are ours.

    Args:
        precision: Of the matrix products.
        group: The ranks that each layer is cut over; None: layers are whole.
    """

    def __init__(self, precision: Precision, group: dist.ProcessGroup | None) -> None:
        super().__init__(precision)
        self._group = group
        self.degree = 1 if group is None else group.size()

    def known(self, module: nn.Module, name: str) -> Any:
        """Return the module."""
        return module

    def check(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Accept the module."""

    def values(self, tensor: Tensor) -> Tensor:
        """Return this rank's part of a parameter."""
        return local(tensor).detach()

    def layers(self, stack: nn.Module) -> list[Any]:
        """Return the layers of a list that this rank's stage runs."""
        return [layer for layer in stack.children() if not isinstance(layer, Remnant)]

    def is_here(self, module: nn.Module) -> bool:
        """Whether this rank's stage holds a module."""
        return not isinstance(module, Absent)

    def linear(self, *modules: nn.Module) -> Linear:
        """Return the product with this rank's part, summed over the ranks where inputs are cut."""
        parts: Any = modules
        group = self._group
        if group is None or not parts or not _is_cut(parts[0].weight, 1):
            return super().linear(*modules)
        product = self.product(join([self.values(part.weight) for part in parts]), None)
        bias = None if parts[0].bias is None else self.floats(parts[0].bias)

        def linear(x: Tensor) -> Tensor:
            # In float32: a sum in fewer bits would depend on the number of ranks.
            y = product(x)
            total = y.float().contiguous()
            dist.all_reduce(total, group=group)
            total = total.to(y.dtype)
            return total if bias is None else total + bias

        return linear

    def scores(self, module: nn.Module, bias_V: Tensor | None) -> Linear:
        """Return the product with this rank's part of the vocabulary."""
        part: Any = module
        bias = None if bias_V is None else self.values(bias_V)[own_box(part.weight)[0]]
        return self.product(self.values(part.weight), bias)

    def lookup(self, module: nn.Module) -> Lookup:
        """Return what looks up rows of an embedding of which each rank may have a part."""
        part: Any = module
        weight_VE, group = self.floats(part.weight), self._group
        if group is None or not _is_cut(part.weight, 0):
            return lambda tokens_N: weight_VE.index_select(0, tokens_N)
        first = own_box(part.weight)[0].start

        def lookup(tokens_N: Tensor) -> Tensor:
            own_N = tokens_N - first
            elsewhere_N = (own_N < 0) | (own_N >= len(weight_VE))
            rows_NE = weight_VE.index_select(0, own_N.masked_fill(elsewhere_N, 0))
            rows_NE = rows_NE.masked_fill(elsewhere_N[:, None], 0).contiguous()
            dist.all_reduce(rows_NE, group=group)  # all but one of the summands are zero
            return rows_NE

        return lookup


class SkeletonParts(Parts):
    """Takes over modules on `meta`: whether a model is known, before there are weights."""

    def values(self, tensor: Tensor) -> Tensor:
        """Return the parameter."""
        return tensor.detach()


def _is_cut(weight: Tensor, dim: int) -> bool:
    return isinstance(weight, DTensor) and weight.placements == (Shard(dim),)
