"""From Hugging Face modules to a network: one adapter per family.

A model is taken only where every part of it is the class whose arithmetic is known here; whatever was replaced or
hooked makes `UnknownModelError`, and transformers decodes it. `cut` takes a part of a model that was cut.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from eagleray.engine.decoder.linear import Linear, Precision, activation_dtype, make_linear
from eagleray.engine.decoder.network import FeedForward, Lookup, Network, Norm


class UnknownModelError(Exception):
    """A model, or a part of it, that this decoder does not know."""


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
}


def build_network(
    model: nn.Module, precision: Precision = "float32", make_parts: Callable[[Precision], Parts] | None = None
) -> Network:
    """Take over a model's weights; they are shared where layout and precision are kept.

    Args:
        model: A model of transformers in evaluation mode, or a part of one.
        precision: Of the matrix products.
        make_parts: Takes over single modules; default: whole ones.

    Raises:
        UnknownModelError: The model is of no known family, or a part of it was changed.
    """
    from eagleray.engine.decoder import marian, t5

    builders: dict[str, Callable[[Any, Parts], Network]] = {
        "MarianMTModel": marian.build,
        "T5ForConditionalGeneration": t5.build,
    }
    name = _class_of(model).__name__
    if name not in builders:
        raise UnknownModelError(f"{name} is decoded by transformers")
    return builders[name](model, (make_parts or Parts)(precision))


class Parts:
    """Takes over single modules of transformers and of torch.

    Args:
        precision: Of the matrix products.
    """

    degree = 1
    """Ranks that each layer is cut over."""

    def __init__(self, precision: Precision) -> None:
        self.precision = precision
        self.dtype = activation_dtype(precision)

    def known(self, module: nn.Module, name: str) -> Any:
        """Return a module of transformers whose forward pass is the class' own.

        Raises:
            UnknownModelError: It is something else.
        """
        cls = _class_of(module)
        if cls.__name__ != name or not cls.__module__.startswith("transformers."):
            raise UnknownModelError(f"{cls.__module__}.{cls.__name__} stands where a {name} is expected")
        if "forward" in module.__dict__:
            raise UnknownModelError(f"the forward pass of a {name} was replaced")
        return module

    def check(self, module: nn.Module, cls: type[nn.Module]) -> None:
        """Refuse a module of torch that is something else, or whose forward pass was replaced.

        Raises:
            UnknownModelError: It is.
        """
        if _class_of(module) is not cls or "forward" in module.__dict__:
            raise UnknownModelError(f"a {type(module).__name__} stands where a {cls.__name__} is expected")

    def values(self, tensor: Tensor) -> Tensor:
        """Return a parameter's values.

        Raises:
            UnknownModelError: Only a part of it is here.
        """
        return plain(tensor)

    def layers(self, stack: nn.Module) -> list[Any]:
        """Return the layers of a list that are here."""
        return list(stack.children())

    def is_here(self, module: nn.Module) -> bool:
        """Whether a module outside of the layers is here."""
        return True

    def linear(self, *modules: nn.Module) -> Linear:
        """Return one product for several projections of the same input.

        Raises:
            UnknownModelError: One of them is not a plain `nn.Linear`.
        """
        for module in modules:
            self.check(module, nn.Linear)
        parts: Any = modules
        if not parts:
            return lambda x: x[..., :0]
        weights = [self.values(part.weight) for part in parts]
        if all(part.bias is None for part in parts):
            return self.product(join(weights), None)
        biases = [
            weight.new_zeros(len(weight)) if part.bias is None else self.values(part.bias)
            for part, weight in zip(parts, weights, strict=True)
        ]
        return self.product(join(weights), join(biases))

    def scores(self, module: nn.Module, bias_V: Tensor | None) -> Linear:
        """Return the product with the vocabulary's matrix.

        Raises:
            UnknownModelError: It is not a plain `nn.Linear`: an adapter, which adds to what the matrix gives.
        """
        self.check(module, nn.Linear)
        part: Any = module
        return self.product(self.values(part.weight), None if bias_V is None else self.values(bias_V))

    def product(self, weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
        """Return the product with a matrix."""
        return make_linear(weight_OI, bias_O, self.precision)

    def layer_norm(self, module: nn.Module) -> Norm:
        """Return a layer norm.

        Raises:
            UnknownModelError: It is something else.
        """
        self.check(module, nn.LayerNorm)
        part: Any = module
        shape, eps = part.normalized_shape, part.eps
        weight, bias = (None if each is None else self.floats(each) for each in (part.weight, part.bias))
        return lambda x: torch.layer_norm(x, shape, weight, bias, eps)

    def embedding(self, module: nn.Module) -> Tensor:
        """Return an embedding's matrix.

        Raises:
            UnknownModelError: It is something else.
        """
        self.check(module, nn.Embedding)
        part: Any = module
        return self.floats(part.weight)

    def lookup(self, module: nn.Module) -> Lookup:
        """Return what looks up rows of an embedding.

        Raises:
            UnknownModelError: It is something else.
        """
        weight_VE = self.embedding(module)
        return lambda tokens_N: weight_VE.index_select(0, tokens_N)

    def feed_forward(
        self, up: nn.Module, down: nn.Module, activation: str, gate: nn.Module | None = None
    ) -> FeedForward:
        """Return the sub-layer of a token by itself.

        Raises:
            UnknownModelError: Its activation is not known.
        """
        if activation not in ACTIVATIONS:
            raise UnknownModelError(f"the activation {activation} is not known")
        gating = None if gate is None else self.linear(gate)
        return FeedForward(self.linear(up), self.linear(down), ACTIVATIONS[activation], gating)

    def floats(self, tensor: Tensor) -> Tensor:
        """Return a parameter's values in the type of the activations."""
        return self.values(tensor).to(self.dtype)


def plain(tensor: Tensor) -> Tensor:
    """Return a parameter's values.

    Raises:
        UnknownModelError: Only a part of it is here.
    """
    if isinstance(tensor, DTensor) or tensor.is_meta:
        raise UnknownModelError("a parameter is not whole here")
    return tensor.detach()


def join(tensors: Sequence[Tensor]) -> Tensor:
    """Stack matrices or vectors on top of each other; one alone is not copied."""
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))


def _class_of(module: nn.Module) -> type:
    """Return a module's class, without what sharding mixes into it.

    Raises:
        UnknownModelError: It has hooks of others.
    """
    cls = type(module)
    if isinstance(module, FSDPModule):
        return cls.__mro__[2]  # fully_shard makes a subclass of FSDPModule and the class; its hooks gather weights
    if module._forward_hooks or module._forward_pre_hooks:
        raise UnknownModelError(f"a {cls.__name__} has hooks")
    return cls
