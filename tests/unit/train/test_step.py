"""The parts of a step that need no other rank."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from eagleray.config.schema import TrainConfig
from eagleray.errors import ConfigError
from eagleray_jobs.train.optimizer import build_optimizer, create_state, set_learning_rate
from eagleray_jobs.train.step import check_precision, seed_step


def config(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 100, **keys})


def draws() -> tuple[float, float, float]:
    return torch.rand(()).item(), float(np.random.rand()), random.random()


def test_random_numbers_come_from_the_four_numbers_alone() -> None:
    seed_step(1, 2, 3, 4)
    first = draws()
    draws()
    seed_step(1, 2, 3, 4)
    assert draws() == first
    for other in [(0, 2, 3, 4), (1, 3, 3, 4), (1, 2, 4, 4), (1, 2, 3, 5)]:
        seed_step(*other)
        assert not set(draws()) & set(first)


def test_half_precision_needs_a_gpu_and_says_what_else_there_is() -> None:
    with pytest.raises(ConfigError, match=r"train\.fp16 needs a GPU, but the workers compute on cpu") as error:
        check_precision(config(fp16=True), torch.device("cpu"))
    assert error.value.hint == "set train.bf16 instead"
    check_precision(config(fp16=True), torch.device("cuda"))
    check_precision(config(bf16=True), torch.device("cpu"))


def test_only_matrices_decay_and_frozen_parameters_are_left_out() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(model, config(weight_decay=0.1))
    groups = {group["weight_decay"]: group["params"] for group in optimizer.param_groups}
    assert set(groups) == {0.1, 0.0}
    assert [id(parameter) for parameter in groups[0.1]] == [id(model[2].weight)]
    assert len(groups[0.0]) == 3


@pytest.mark.parametrize("keys", [{"optim": "adamw"}, {"optim": "sgd", "momentum": 0.9}, {"optim": "sgd"}])
def test_created_state_is_what_the_first_update_would_create(keys: dict[str, Any]) -> None:
    def stepped(create: bool) -> dict[str, Any]:
        torch.manual_seed(0)
        model = nn.Linear(3, 2)
        optimizer = build_optimizer(model, config(**keys))
        if create:
            create_state(optimizer)
        else:
            model(torch.ones(1, 3)).sum().backward()
            optimizer.step()
        return {
            f"{number}.{key}": (value.shape, value.dtype)
            for number, parameter in enumerate(model.parameters())
            for key, value in optimizer.state[parameter].items()
            if isinstance(value, torch.Tensor)
        }

    assert stepped(create=True) == stepped(create=False)


def test_the_learning_rate_reaches_every_group() -> None:
    optimizer = build_optimizer(nn.Linear(3, 2), config(weight_decay=0.1))
    set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
