"""Models of any kind in a lower precision: their matrix products alone are changed."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from eagleray.engine.decoder.linear import Precision, activation_dtype, make_linear


class LowLinear(nn.Module):
    """Stands where an `nn.Linear` was: computes in another precision, takes and gives what the model works with.

    Args:
        linear: What it replaces.
        precision: Of the product.
    """

    def __init__(self, linear: nn.Linear, precision: Precision) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        # Some models of transformers ask a weight for its type; none may compute with this one.
        self.weight = linear.weight.detach().to("meta")
        bias = None if linear.bias is None else linear.bias.detach()
        self._product = make_linear(linear.weight.detach(), bias, precision)
        self._dtype = activation_dtype(precision)

    def forward(self, x: Tensor) -> Tensor:
        """Return the product."""
        return self._product(x.to(self._dtype)).to(x.dtype)


def lower_precision(model: nn.Module, precision: Precision) -> nn.Module:
    """Replace every plain `nn.Linear` of a model, in place; norms, embeddings and attention stay as they are.

    Args:
        model: A model in evaluation mode.
        precision: Of the matrix products; float32 changes nothing.
    """
    if precision == "float32":
        return model
    parents = [(parent, name) for parent in model.modules() for name in parent._modules]
    replaced: dict[int, Any] = {}  # a module that stands in several places is replaced once
    for parent, name in parents:
        child = getattr(parent, name)
        if type(child) is nn.Linear:
            replaced.setdefault(id(child), LowLinear(child, precision))
            setattr(parent, name, replaced[id(child)])
    return model
