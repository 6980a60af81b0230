"""A user's own task: echoes a value with the size of the batch that it was answered in and the process."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from eagleray.tasks import Answer, Batch, Encoded, Example, Features, Loss, Processor, Task

HANGS = -1.0
"""The value at which the model never comes back."""


class EchoProcessor(Processor):
    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> EchoProcessor:
        return cls()


class EchoTask(Task):
    columns: ClassVar[tuple[str, ...]] = ("value",)
    input_columns: ClassVar[tuple[str, ...]] = ("value",)

    def build_processor(self, examples: Iterable[Example]) -> Processor:
        return EchoProcessor()

    def load_processor(self, files: Mapping[str, bytes]) -> Processor:
        return EchoProcessor()

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        return Encoded({"value": float(example["value"])}, 1)

    def collate(self, rows: Sequence[Features], processor: Processor) -> Batch:
        return {"value": torch.tensor([row["value"] for row in rows], dtype=torch.float64)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(batch["value"]).sum(), torch.tensor(len(batch["value"])))

    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        time.sleep(float(self.config.model.config.get("sleep_s", 0)))
        values = batch["value"].tolist()
        if HANGS in values:
            time.sleep(10**6)
        return [{"value": value, "batch": len(values), "pid": os.getpid()} for value in values]

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        return {}


class Echo(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def build(**_: Any) -> nn.Module:
    return Echo()
