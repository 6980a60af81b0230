"""A user's own task: text classification whose steps take long enough to be interrupted."""

from __future__ import annotations

import time

import torch.distributed as dist
from torch import nn

from eagleray.tasks.base import Batch, Loss
from eagleray.tasks.text_classification import TextClassificationTask

STEP_S = 0.25


class SlowWords(TextClassificationTask):
    """Sleep before each training loss."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if model.training:
            time.sleep(STEP_S)
        return super().loss(model, batch)


class BrokenWords(SlowWords):
    """Raise on rank 1 alone."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if dist.get_rank() == 1:
            raise KeyError("no such word")
        return super().loss(model, batch)


class StuckWords(SlowWords):
    """Hang on rank 1 alone, in the third step."""

    num_losses = 0

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        self.num_losses += model.training
        if dist.get_rank() == 1 and self.num_losses == 3:
            time.sleep(3600)
        return super().loss(model, batch)
