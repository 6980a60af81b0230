"""Low-rank adapters (Hu et al. 2021, LoRA, arXiv 2106.09685): y = W x + alpha / rank * B A x, W untouched.

A and B stand inside of the Linear that they adapt, so that every weight keeps its name, and bear the names that
peft gives them: `<linear>.lora_A.weight`, shape (rank, in), and `<linear>.lora_B.weight`, shape (out, rank).
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from eagleray.config.schema import AdapterConfig
from eagleray.errors import ConfigError

_FACTORS = (".lora_A.weight", ".lora_B.weight")


class LowRank(nn.Linear):
    """One of the two matrices. B starts at zero, so that a new adapter changes nothing."""

    def __init__(self, in_features: int, out_features: int, *, zero: bool, like: Tensor) -> None:
        self._zero = zero
        super().__init__(in_features, out_features, bias=False, device=like.device, dtype=like.dtype)

    def reset_parameters(self) -> None:
        """Set the initial weights."""
        if self._zero:
            nn.init.zeros_(self.weight)
        else:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))


class LoraLinear(nn.Linear):
    """A Linear with an adapter; it takes over the weight and the bias of the one that it replaces."""

    def __init__(self, linear: nn.Linear, config: AdapterConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.scale
        self.lora_dropout = nn.Dropout(config.dropout)
        self.lora_A = LowRank(linear.in_features, config.rank, zero=False, like=linear.weight)
        self.lora_B = LowRank(config.rank, linear.out_features, zero=True, like=linear.weight)
        self.train(linear.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b and what the adapter adds."""
        return F.linear(x, self.weight, self.bias) + self.adapt(x)

    def adapt(self, x: Tensor) -> Tensor:
        """Return what the adapter adds."""
        added: Tensor = self.lora_B(self.lora_A(self.lora_dropout(x))) * self.scale
        return added


def add_adapter(model: nn.Module, config: AdapterConfig) -> None:
    """Put adapters into a model, on whatever device it is, and freeze everything else.

    The matrices are set by `models.initialize`, or by `reset_parameters` where the model is on a device already.

    Raises:
        ConfigError: A pattern matches nothing, or a weight that is shared with another module.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    targets = _matching(linears, config.target_modules, "target_modules", "Linear modules")
    saved = saved_modules(model, config)
    holders = [id(p) for module in model.modules() for p in module.parameters(recurse=False)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name in targets:
        if holders.count(id(linears[name].weight)) > 1:
            raise ConfigError(
                f"model.adapter.target_modules: the weight of {name} is tied to another module, which an adapter "
                "would not change",
                "leave it out",
            )
        parent, _, key = name.rpartition(".")
        setattr(model.get_submodule(parent), key, LoraLinear(linears[name], config))
    for name in saved:
        model.get_submodule(name).requires_grad_(True)


def saved_modules(model: nn.Module, config: AdapterConfig) -> list[str]:
    """Return the names of the modules that are trained whole.

    Raises:
        ConfigError: A pattern matches nothing.
    """
    names = (name for name, _ in model.named_modules() if name)
    return _matching(names, config.modules_to_save, "modules_to_save", "modules")


def is_factor(name: str) -> bool:
    """Say whether a parameter is a matrix of an adapter."""
    return name.endswith(_FACTORS)


@torch.no_grad()
def merged(parameters: Mapping[str, Tensor], scale: float) -> dict[str, Tensor]:
    """Return the weights with their adapters added: W + scale * (B A), bit-equal in every layout.

    Args:
        parameters: Weights and matrices of adapters by name, plain or cut over ranks; those of one Linear are held
            by the same ranks, which call this together.
        scale: What the product is multiplied by.

    Returns:
        Weights without adapters, by name, cut as they were.
    """
    found: dict[str, Tensor] = {}
    for name, weight in parameters.items():
        prefix = name.removesuffix(".weight")
        a, b = (parameters.get(prefix + factor) for factor in _FACTORS)
        if not is_factor(name):
            found[name] = weight.detach() if a is None or b is None else _add(weight.detach(), scale, a, b)
    return found


def _add(weight: Tensor, scale: float, a: Tensor, b: Tensor) -> Tensor:
    # The whole product on every rank: a part of it, computed alone, can differ in its last bits.
    added = scale * (_whole(b) @ _whole(a))
    if not isinstance(weight, DTensor):
        return weight + added
    (chunk,) = weight.__create_chunk_list__()  # type: ignore[no-untyped-call]
    part = added[tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))]
    return DTensor.from_local(
        weight.to_local() + part,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )


def _whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach()


def _matching(names: Iterable[str], patterns: list[str], key: str, kind: str) -> list[str]:
    """Return the names that a pattern matches, whole or by their end.

    Raises:
        ConfigError: A pattern matches none.
    """
    known, found = list(names), set[str]()
    for pattern in patterns:
        matching = {name for name in known if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}")}
        if not matching:
            ends = sorted({name.rpartition(".")[2] for name in known})
            raise ConfigError(
                f"model.adapter.{key}: {pattern!r} matches none of the {len(known)} {kind}",
                f"their names end in {', '.join(ends)}",
            )
        found |= matching
    return [name for name in known if name in found]
