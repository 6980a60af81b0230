"""The learning rate and the length of a run as pure functions: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from eagleray.config.schema import TrainConfig


def num_steps(config: TrainConfig, num_examples: int) -> int:
    """Return the optimizer steps of the whole run.

    Epochs are rounded up to whole steps: `num_train_epochs: 1` sees every example at least once.
    """
    if config.max_steps is not None:
        return config.max_steps
    assert config.num_train_epochs is not None, "the schema asks for one of the two"
    return max(1, math.ceil(config.num_train_epochs * num_examples / config.global_batch_size))


def num_warmup_steps(config: TrainConfig, max_steps: int) -> int:
    """Return the steps of warm-up; a value below 1 is a share of all steps, rounded up."""
    steps = config.warmup_steps
    return math.ceil(steps * max_steps) if steps < 1 else math.ceil(steps)


def peak_learning_rate(config: TrainConfig) -> float:
    """Return the learning rate after warm-up, scaled to the global batch.

    `linear` multiplies by the ratio k of the batch to the reference batch (Goyal et al. 2017,
    arXiv 1706.02677), `sqrt` by its root (Krizhevsky 2014, arXiv 1404.5997; Hoffer et al. 2017,
    arXiv 1705.08741).
    """
    if config.learning_rate_scaling == "none":
        return config.learning_rate
    assert config.learning_rate_reference_batch_size is not None, "the schema asks for it"
    ratio = config.global_batch_size / config.learning_rate_reference_batch_size
    return config.learning_rate * (ratio if config.learning_rate_scaling == "linear" else math.sqrt(ratio))


def learning_rate(config: TrainConfig, step: int, max_steps: int) -> float:
    """Return the learning rate of a step.

    Args:
        config: The `train` section.
        step: The step, counted from 1.
        max_steps: Steps of the whole run.

    Step `s` uses the value that transformers' schedulers give at `s - 1` for the decay, but warm-up counts
    from 1, so that no step is spent at a learning rate of zero.
    """
    warmup = num_warmup_steps(config, max_steps)
    peak = peak_learning_rate(config)
    if step <= warmup:
        return peak * step / warmup
    return peak * _decay(config.lr_scheduler_type, step - 1, warmup, max_steps)


def _decay(shape: str, done: int, warmup: int, max_steps: int) -> float:
    if shape == "constant":
        return 1.0
    if shape == "inverse_sqrt":  # Vaswani et al. 2017, arXiv 1706.03762; transformers' time scale without warm-up
        scale = warmup or 10_000
        return math.sqrt(scale / (done + scale - warmup))
    progress = min(1.0, (done - warmup) / max(1, max_steps - warmup))
    if shape == "linear":
        return 1.0 - progress
    assert shape == "cosine", shape  # Loshchilov and Hutter 2016, arXiv 1608.03983, without restarts
    return 0.5 * (1.0 + math.cos(math.pi * progress))
