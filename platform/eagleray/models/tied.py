"""Parameters that a model's config ties and a checkpoint does not."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn


def untie(model: nn.Module, names: Collection[str]) -> None:
    """Give modules weights of their own under these names, where they share them with other modules.

    What a checkpoint holds decides: T5's config says that its head is tied whatever the checkpoint holds, and the
    second version of T5 has a head of its own.
    """
    first = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    for name in tied & set(names):
        module_name, _, key = name.rpartition(".")
        parameter = model.get_parameter(name)
        copied = nn.Parameter(parameter.detach().clone(), requires_grad=parameter.requires_grad)
        model.get_submodule(module_name).register_parameter(key, copied)
