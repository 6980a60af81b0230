"""A user's own task whose answers tell which weights made them; a negative one fails on large values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from echo_task import EchoTask
from torch import nn

from eagleray.tasks import Answer, Batch, Processor

LARGE = 1000


class FactorTask(EchoTask):
    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        values = batch["value"]
        if float(model.weight) < 0 and float(values.max()) > LARGE:  # type: ignore[arg-type]
            raise ValueError("a large value meets a negative weight")
        return [{"value": value} for value in model(values).tolist()]
