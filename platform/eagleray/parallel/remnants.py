"""What stands in a pipeline stage for modules that other stages hold."""

from __future__ import annotations

from torch import nn


class Absent(nn.Module):
    """Stands for a module that another stage holds.

    Its tensors are on `meta` and none of its parameters, so that a parent that sets its children's initial weights
    finds them, and nothing is stored or trained.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        for name, parameter in module._parameters.items():
            setattr(self, name, None if parameter is None else parameter.detach().to("meta"))


class Remnant(nn.Module):
    """What a stage keeps of a layer that another stage runs: modules that its own layers read."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
