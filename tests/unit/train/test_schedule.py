"""Learning-rate curves against their formulas, and against the schedulers that users know."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import transformers

from eagleray.config.schema import TrainConfig
from eagleray_jobs.train.schedule import learning_rate, num_steps, num_warmup_steps, peak_learning_rate


def config(**keys: Any) -> TrainConfig:
    return TrainConfig(**{"max_steps": 100, "learning_rate": 2.0, **keys})


def curve(train: TrainConfig, max_steps: int = 100) -> list[float]:
    return [learning_rate(train, step, max_steps) for step in range(1, max_steps + 1)]


def test_warmup_is_linear_and_wastes_no_step_at_zero() -> None:
    assert curve(config(warmup_steps=4.0))[:5] == [0.5, 1.0, 1.5, 2.0, 2.0]


def test_warmup_below_one_is_a_share_of_all_steps() -> None:
    assert num_warmup_steps(config(warmup_steps=0.25), 100) == 25
    assert num_warmup_steps(config(warmup_steps=0.001), 100) == 1
    assert num_warmup_steps(config(warmup_steps=1.0), 100) == 1


@pytest.mark.parametrize(
    "shape, at_halfway", [("linear", 1.0), ("cosine", 1.0), ("constant", 2.0)], ids=lambda value: str(value)
)
def test_shapes_at_halfway(shape: str, at_halfway: float) -> None:
    assert learning_rate(config(lr_scheduler_type=shape), 51, 100) == pytest.approx(at_halfway)


def test_cosine_follows_its_formula() -> None:
    expected = [2.0 * 0.5 * (1 + math.cos(math.pi * done / 80)) for done in range(80)]
    assert curve(config(lr_scheduler_type="cosine", warmup_steps=20.0))[20:] == pytest.approx(expected)


def test_inverse_sqrt_falls_with_the_root_of_the_steps() -> None:
    rates = curve(config(lr_scheduler_type="inverse_sqrt", warmup_steps=4.0), 101)
    assert rates[16] == pytest.approx(2.0 * math.sqrt(4 / 16))
    assert rates[100] == pytest.approx(2.0 * math.sqrt(4 / 100))


@pytest.mark.parametrize("shape", ["linear", "cosine", "constant", "inverse_sqrt"])
@pytest.mark.parametrize("warmup", [0, 10])
def test_the_decay_is_that_of_transformers(shape: str, warmup: int) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    name = {"constant": "constant_with_warmup"}.get(shape, shape)
    schedule = transformers.get_scheduler(name, optimizer, warmup, 100)
    theirs = []
    for _ in range(100):
        theirs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    ours = curve(config(lr_scheduler_type=shape, warmup_steps=float(warmup)))
    assert ours[warmup:] == pytest.approx(theirs[warmup:])


def test_the_rate_never_becomes_negative_beyond_the_last_step() -> None:
    assert learning_rate(config(), 150, 100) == 0.0


@pytest.mark.parametrize("rule, factor", [("none", 1.0), ("linear", 4.0), ("sqrt", 2.0)])
def test_scaling_with_the_batch(rule: str, factor: float) -> None:
    train = config(learning_rate_scaling=rule, learning_rate_reference_batch_size=64, global_batch_size=256)
    assert peak_learning_rate(train) == 2.0 * factor
    assert learning_rate(train, 1, 100) == 2.0 * factor


def test_epochs_become_whole_steps() -> None:
    epochs = TrainConfig(num_train_epochs=2.0, global_batch_size=10)
    assert num_steps(epochs, 101) == 21
    assert num_steps(config(max_steps=7), 101) == 7
