"""A task whose model does nothing: what is left is the way of a request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from eagleray.tasks import Answer, Batch, Encoded, Example, Features, Loss, Processor, Task


class NoProcessor(Processor):
    """Nothing is learnt from examples."""

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> NoProcessor:
        return cls()


class NoopTask(Task):
    """Gives every value back."""

    columns: ClassVar[tuple[str, ...]] = ("value",)
    input_columns: ClassVar[tuple[str, ...]] = ("value",)

    def build_processor(self, examples: Iterable[Example]) -> Processor:
        return NoProcessor()

    def load_processor(self, files: Mapping[str, bytes]) -> Processor:
        return NoProcessor()

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        return Encoded({"value": float(example["value"])}, 1)

    def collate(self, rows: Sequence[Features], processor: Processor) -> Batch:
        return {"value": torch.tensor([row["value"] for row in rows])}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(model(torch.zeros(())), torch.tensor(1))

    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        return [{"value": value} for value in batch["value"].tolist()]

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        return {}


class Noop(nn.Module):
    """One weight, so that there is something to commit."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.weight


def build(**_: Any) -> nn.Module:
    return Noop()
