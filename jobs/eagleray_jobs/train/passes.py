"""The forward and backward passes of one rank's share of a global batch: the seam between a step and a layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eagleray.config.schema import TrainConfig
from eagleray.parallel import Pipeline
from eagleray.parallel.timeline import Timeline
from eagleray.tasks.base import Loss, Task, move
from eagleray_jobs.train.batches import MicroBatch, StepBatch

ScaleLoss = Callable[[Tensor], Tensor]
"""What a summed loss is turned into before its backward pass."""

Seed = Callable[[int, int], None]
"""Seeds random numbers for (step, micro-batch)."""


class Passes(Protocol):
    """Adds the gradients of a step's micro-batches to those of the parameters."""

    def run(self, batch: StepBatch, scale_loss: ScaleLoss, known: Callable[[Sequence[Loss]], None]) -> None:
        """Run all micro-batches.

        Args:
            batch: This rank's share of the global batch.
            scale_loss: Applied before each backward pass.
            known: Called once with the losses, as soon as they can be read without waiting for the device;
                they are empty on a rank that computes none.
        """
        ...


class ModelPasses:
    """One micro-batch after the other through a model that is called."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: TrainConfig,
        device: torch.device,
        seed: Seed,
        timeline: Timeline,
    ) -> None:
        self._model = model
        self._task = task
        self._timeline = timeline
        self._config = config
        self._device = device
        self._seed = seed

    def run(self, batch: StepBatch, scale_loss: ScaleLoss, known: Callable[[Sequence[Loss]], None]) -> None:
        """Run all micro-batches; gradients are exchanged in the last backward pass."""
        losses: list[Loss] = []
        for index, micro_batch in enumerate(batch.micro_batches):
            is_last = index == len(batch.micro_batches) - 1
            with self._gradient_sync(is_last):
                self._seed(batch.step, index)
                with self._timeline.span("forward", micro_batch=index):
                    losses.append(self._forward(micro_batch))
                if is_last and self._device.type == "cpu":
                    known(losses)
                with self._timeline.span("backward", micro_batch=index):
                    torch.autograd.backward(scale_loss(losses[-1].total))
                losses[-1] = Loss(losses[-1].total.detach(), losses[-1].count)
        # On a GPU reading the loss waits for the forward pass, so it comes after the backward is queued.
        if self._device.type != "cpu":
            known(losses)

    def _forward(self, micro_batch: MicroBatch) -> Loss:
        with autocast(self._config, self._device):
            loss = self._task.loss(self._model, move(micro_batch.batch, self._device))
        if micro_batch.filler:
            return Loss(loss.total * 0.0, loss.count * 0)
        return loss

    def _gradient_sync(self, is_last: bool) -> AbstractContextManager[None]:
        if is_last or not isinstance(self._model, DistributedDataParallel):
            return nullcontext()
        return self._model.no_sync()


class PipelinePasses:
    """All micro-batches through the stages of a pipeline, in the order of its schedule."""

    def __init__(self, pipeline: Pipeline, config: TrainConfig, device: torch.device, seed: Seed) -> None:
        self._pipeline = pipeline
        self._config = config
        self._device = device
        self._seed = seed

    def run(self, batch: StepBatch, scale_loss: ScaleLoss, known: Callable[[Sequence[Loss]], None]) -> None:
        """Run the schedule; the whole share is one collated batch that the pipeline cuts."""
        assert len(batch.micro_batches) == 1, "the pipeline cuts the micro-batches"
        self._seed(batch.step, 0)
        with autocast(self._config, self._device), self._pipeline.timeline.span("pipeline"):
            losses = self._pipeline.run(move(batch.micro_batches[0].batch, self._device), scale_loss)
        known([Loss(total, count) for total, count in zip(losses.totals, losses.counts, strict=True)])


def autocast(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """Compute in the precision that the file asks for."""
    if not (config.bf16 or config.fp16):
        return nullcontext()
    return torch.autocast(device.type, torch.bfloat16 if config.bf16 else torch.float16)
