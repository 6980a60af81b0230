"""The task: from a row to tensors, from tensors to a loss and to an answer, and how answers are scored."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from eagleray.errors import DataError
from eagleray.tasks import Answer, Batch, Encoded, Example, Features, Loss, Processor, Task

_FILE = "length_guess.json"


class LengthProcessor(Processor):
    """What the task learns from the data before training: mean and standard deviation of the lengths."""

    def __init__(self, mean: float, std: float) -> None:
        self.mean, self.std = mean, std

    def files(self) -> dict[str, bytes]:
        """Return what travels in the checkpoint."""
        return {_FILE: json.dumps({"mean": self.mean, "std": self.std}).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> LengthProcessor:
        """Read it back."""
        return cls(**json.loads(files[_FILE]))


class LengthTask(Task):
    """Guess how many characters the `target` of a `source` has, for example to lay out a button."""

    columns: ClassVar[tuple[str, ...]] = ("source", "target")
    input_columns: ClassVar[tuple[str, ...]] = ("source",)
    best_metric: ClassVar[tuple[str, bool]] = ("mean_absolute_error", False)

    def build_processor(self, examples: Iterable[Example]) -> LengthProcessor:
        """Look at every training example once."""
        lengths = [len(example["target"]) for example in examples]
        return LengthProcessor(statistics.fmean(lengths), statistics.pstdev(lengths) or 1.0)

    def load_processor(self, files: Mapping[str, bytes]) -> LengthProcessor:
        """Rebuild it from a checkpoint."""
        return LengthProcessor.from_files(files)

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        """Turn a row into numbers; what raises `DataError` is reported with its line, or answered with 422."""
        text = example.get("source")
        if not isinstance(text, str) or not text:
            raise DataError(f"column 'source' holds {text!r}, but must be text")
        data = text.encode()
        limit = self.config.data.max_source_length
        features: Features = {"text": [byte + 1 for byte in data[:limit]]}
        if not answer:
            features["length"] = float(len(example["target"]))
        return Encoded(features, min(len(data), limit), truncated=len(data) > limit)

    def collate(self, rows: Sequence[Features], processor: Processor) -> Batch:
        """Pad the rows of a batch to the longest of them."""
        texts = [torch.tensor(row["text"]) for row in rows]
        batch = {"text": nn.utils.rnn.pad_sequence(texts, batch_first=True)}
        if rows and "length" in rows[0]:
            batch["length"] = torch.tensor([row["length"] for row in rows])
        return batch

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum over the examples: what divides it is the count of the global batch, over all workers."""
        guesses = model(batch["text"])
        total = nn.functional.smooth_l1_loss(guesses, batch["length"], reduction="sum")
        return Loss(total, torch.tensor(len(guesses), device=guesses.device))

    @torch.inference_mode()
    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        """Answer each item with JSON."""
        return [{"characters": round(guess)} for guess in model(batch["text"]).tolist()]

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        """Compare answers with what they should have been."""
        errors = [
            abs(answer["characters"] - len(example["target"]))
            for answer, example in zip(answers, examples, strict=True)
        ]
        return {"mean_absolute_error": statistics.fmean(errors)}
