"""The optimizer that the file asks for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from eagleray.config.schema import TrainConfig


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """Make AdamW (Loshchilov and Hutter 2017, arXiv 1711.05101) or SGD; only matrices decay.

    The learning rate is set at every step from `schedule.learning_rate`.
    """
    groups = _decay_groups(model.parameters(), config.weight_decay)
    if config.optim == "sgd":
        # torch's fused SGD does not know tensors that are cut over ranks.
        is_cut = any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"])
        return SGD(groups, lr=config.learning_rate, momentum=config.momentum, fused=not is_cut)
    betas = (config.adam_beta1, config.adam_beta2)
    return AdamW(groups, lr=config.learning_rate, betas=betas, eps=config.adam_epsilon, fused=True)


def set_learning_rate(optimizer: Optimizer, value: float) -> None:
    """Use a learning rate from the next update on."""
    for group in optimizer.param_groups:
        group["lr"] = value


def create_state(optimizer: Optimizer) -> None:
    """Allocate the state that the optimizer would make in its first update, so that it can be loaded in place."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if not optimizer.state[parameter]:
                optimizer.state[parameter].update(_empty_state(optimizer, parameter))


def _empty_state(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    if isinstance(optimizer, SGD):
        has_momentum = any(group["momentum"] for group in optimizer.param_groups)
        return {"momentum_buffer": torch.zeros_like(parameter)} if has_momentum else {}
    assert isinstance(optimizer, AdamW), type(optimizer)
    return {
        "step": torch.zeros((), dtype=torch.float32, device=parameter.device),  # fused: on the device
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


def _decay_groups(parameters: Iterable[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    groups: dict[Any, list[nn.Parameter]] = {}
    for parameter in trained:
        # One kernel updates a whole group, and cannot mix tensors that are cut over different ranks.
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault((weight_decay if parameter.ndim >= 2 else 0.0, mesh), []).append(parameter)
    found = [{"params": members, "weight_decay": decay} for (decay, _), members in groups.items()]
    # A stage of a pipeline may train nothing, and an optimizer refuses to have no group at all.
    return found or [{"params": [], "weight_decay": 0.0}]
