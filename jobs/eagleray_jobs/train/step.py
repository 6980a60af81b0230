"""One optimizer step: forward and backward over the micro-batches, the loss over the global batch, the update."""

from __future__ import annotations

import hashlib
import math
import random
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eagleray.config.schema import TrainConfig
from eagleray.errors import ConfigError, NonFiniteLossError
from eagleray.parallel import DataCoordinate, Pipeline
from eagleray.parallel.gradients import gradient_norm, local_gradients
from eagleray.parallel.timeline import Timeline
from eagleray.tasks.base import Loss, Task
from eagleray_jobs.train.batches import StepBatch
from eagleray_jobs.train.exchange import Exchange, Pending, Totals
from eagleray_jobs.train.optimizer import set_learning_rate
from eagleray_jobs.train.passes import ModelPasses, Passes, PipelinePasses
from eagleray_jobs.train.probe import Probe


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step gave; equal on every rank.

    Attributes:
        totals: Loss, count and requests of all ranks.
        grad_norm: Norm of the gradient before clipping, on the device, shape ().
    """

    totals: Totals
    grad_norm: Tensor


class TrainStep:
    """Runs optimizer steps.

    The loss is the sum over the items of the global batch divided by their number. The number is known only
    after the last forward pass, so gradients are made of sums (divided by a constant that keeps them in
    range) and scaled once, together with clipping, when the ranks have told each other their counts.

    Args:
        model: What is called for training (from `apply_layout`), or the stages of this rank.
        task: Computes the loss.
        optimizer: Updates the trained parameters of `model`.
        config: The `train` section.
        exchange: Carries the totals between the ranks.
        coordinate: Which slice of the global batch this rank reads.
        device: Where this rank computes.
        probe: Sees the gradients of every step.
        timeline: Records what a step does.
    """

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        optimizer: Optimizer,
        config: TrainConfig,
        exchange: Exchange,
        coordinate: DataCoordinate,
        device: torch.device,
        probe: Probe | None = None,
        timeline: Timeline | None = None,
    ) -> None:
        check_precision(config, device)
        self._model = model
        self._optimizer = optimizer
        self._config = config
        self._exchange = exchange
        self._coordinate = coordinate
        self._probe = probe
        self._timeline = timeline or Timeline()
        self._seed_torch = torch.default_generator.manual_seed if device.type == "cpu" else torch.manual_seed
        self._parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        self._passes: Passes
        self._counted, self._stages = self._parameters, None
        if isinstance(model, Pipeline):
            model.timeline = self._timeline
            self._passes = PipelinePasses(model, config, device, self._seed)
            self._counted, self._stages = model.counted_parameters(), model.group
        else:
            self._passes = ModelPasses(model, task, config, device, self._seed, self._timeline)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.fp16)
        self._checked_gradients = False

    def run(
        self,
        batch: StepBatch,
        learning_rate: float,
        *,
        stop: bool,
        saving: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Take one step.

        Args:
            batch: This rank's share of the global batch.
            learning_rate: Of this step.
            stop: Whether this rank was asked to stop; comes back summed over all ranks.
            saving: Whether this rank still writes a checkpoint; likewise.
            meanwhile: Called before the last backward pass, which leaves Python to others.

        Raises:
            NonFiniteLossError: Any rank's loss is NaN or infinite; raised on all of them, before the update.
        """
        self._model.train()
        self._optimizer.zero_grad(set_to_none=True)
        totals = self._forward_backward(batch, stop, saving, meanwhile)
        if not math.isfinite(totals.loss):
            self._raise_non_finite(batch.step)
        self._check_gradients()
        self.scaler.unscale_(self._optimizer)
        scale = self._gradient_scale(totals)
        if self._probe is not None:
            self._probe.backward(batch.step, scale)
        with self._timeline.span("clip"):
            grad_norm = self._scale_and_clip(scale)
        with self._timeline.span("optimizer"):
            set_learning_rate(self._optimizer, learning_rate)
            self.scaler.step(self._optimizer)
            self.scaler.update()
        return StepResult(totals, grad_norm)

    def release_gradients(self) -> None:
        """Free the gradients of the last step, which nothing reads any more, for what needs memory besides."""
        self._optimizer.zero_grad(set_to_none=True)

    def _forward_backward(
        self, batch: StepBatch, stop: bool, saving: bool, meanwhile: Callable[[], None]
    ) -> Totals:
        """Accumulate gradients; the totals travel while the last backward pass runs."""
        sent: list[Pending] = []

        def known(losses: Sequence[Loss]) -> None:
            meanwhile()
            sent.append(self._send(losses, stop, saving))

        self._passes.run(batch, self._scale_loss, known)
        with self._timeline.span("exchange"):
            return sent[0].wait()

    def _scale_loss(self, total: Tensor) -> Tensor:
        return self.scaler.scale(total / self._normalizer)

    def _seed(self, step: int, micro_batch: int) -> None:
        seed_step(self._config.seed, step, micro_batch, self._coordinate.rank, self._seed_torch)

    def _send(self, losses: Sequence[Loss], stop: bool, saving: bool) -> Pending:
        # One copy to the host for both, in float64: counts stay exact.
        pairs = [torch.stack([loss.total.detach().double(), loss.count.double()]) for loss in losses]
        local_loss, count = torch.stack(pairs).sum(0).tolist() if pairs else (0.0, 0.0)
        self._local_loss = float(local_loss)
        share = (self._local_loss, int(count)) if self._coordinate.counts else (0.0, 0)
        return self._exchange.start(*share, stop=stop, saving=saving)

    @property
    def _normalizer(self) -> float:
        """A constant near the number of items, so that summed gradients stay in range."""
        return float(self._config.global_batch_size)

    def _gradient_scale(self, totals: Totals) -> float:
        """What turns averaged gradients of sums into gradients of the mean over the global batch."""
        return self._normalizer * self._coordinate.world / max(totals.count, 1.0)

    def _scale_and_clip(self, scale: float) -> Tensor:
        """Turn the sums into means and clip them, in one pass; return the norm before clipping."""
        norm = gradient_norm(self._counted, self._stages) * scale
        limit = self._config.max_grad_norm
        clip = 1.0 if limit is None else torch.clamp(limit / (norm + 1e-6), max=1.0)
        if gradients := local_gradients(self._parameters):
            factor = scale * clip
            if isinstance(factor, Tensor):
                factor = factor.to(gradients[0].device)  # the host, where they are offloaded
            torch._foreach_mul_(gradients, factor)
        return norm

    def _raise_non_finite(self, step: int) -> None:
        found = self._exchange.first_non_finite(self._local_loss)
        where = f"{found[1]} on rank {found[0]}" if found else "infinite as a sum over all ranks"
        raise NonFiniteLossError(f"the loss of step {step} is {where}")

    def _check_gradients(self) -> None:
        """Once: every trained parameter got a gradient, since DDP would wait for the missing ones."""
        if self._checked_gradients:
            return
        self._checked_gradients = True
        missing = list(_names_without_gradient(self._model))
        if missing:
            shown = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ConfigError(
                f"the loss does not depend on {len(missing)} trained parameters: {shown}",
                "name them under model.freeze",
            )


def check_precision(config: TrainConfig, device: torch.device) -> None:
    """Refuse a precision that the device does not have.

    Raises:
        ConfigError: `fp16` on a CPU.
    """
    if config.fp16 and device.type != "cuda":
        raise ConfigError(
            f"train.fp16 needs a GPU, but the workers compute on {device.type}", "set train.bf16 instead"
        )


def seed_step(
    seed: int,
    step: int,
    micro_batch: int,
    data_rank: int,
    seed_torch: Callable[[int], object] = torch.manual_seed,
) -> None:
    """Seed torch, NumPy and `random` from these numbers alone, so that a resumed run draws the same dropout.

    Where only the CPU computes, `seed_torch` can be its generator's: `torch.manual_seed` asks every kind of device
    that there might be, half a millisecond long.
    """
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_batch, data_rank), digest_size=8).digest()
    value = int.from_bytes(digest, "little") >> 1
    seed_torch(value)
    random.seed(value)
    np.random.seed(value & 0xFFFFFFFF)


def _names_without_gradient(model: nn.Module) -> Iterator[str]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.grad is None:
            yield name.removeprefix("module.")
