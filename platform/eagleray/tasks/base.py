"""The seam between a kind of problem and everything else: example -> tensors, loss, answer, score."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError

Example = Mapping[str, Any]
"""One row under the task's column names; may carry `kind` (scores are shown per kind) and `key` (the split)."""

Features = dict[str, Any]
"""What preparation writes for one example: lists of int, numbers, str or bytes; Arrow stores it."""

Batch = dict[str, Tensor]
"""Collated features, on the CPU; dim 0 is the example."""

Answer = dict[str, Any]
"""What a server returns for one item; JSON."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """Features of one example.

    Attributes:
        features: What the model trains on.
        length: Tokens (or 1 for an image): what batching, sorting and admission count.
        truncated: Whether something was cut off.
    """

    features: Features
    length: int
    truncated: bool = False


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss that can be summed over micro-batches and workers.

    Attributes:
        total: Sum over the items, differentiable, shape ().
        count: Number of items (tokens or examples) in the sum, shape (), int64.
    """

    total: Tensor
    count: Tensor


Predict = TypeVar("Predict", bound=Callable[..., Any])

Head = Literal["seq2seq-lm", "sequence-classification", "image-classification"]
"""What a Hugging Face model of a task ends in."""


class Processor(ABC):
    """What turns examples into features and back: tokenizer, labels, image size. Travels in the checkpoint."""

    labels: Sequence[str] = ()
    """Class names in the order of their numbers; empty where there are none."""

    @abstractmethod
    def files(self) -> dict[str, bytes]:
        """Return the files to store, in Hugging Face's names (`tokenizer.json`, ...)."""

    @classmethod
    @abstractmethod
    def from_files(cls, files: Mapping[str, bytes]) -> Processor:
        """Rebuild the processor from the files of a checkpoint."""


class Task(ABC):
    """A kind of problem. Subclass it for your own, and name it as `task: package.module:Class`.

    A task is created from the whole file and holds no weights and no data. Every method is pure, so that it
    runs in a preparation worker, a training worker and a replica alike.
    """

    route: ClassVar[Literal["translate", "classify", "predict"]] = "predict"
    columns: ClassVar[tuple[str, ...]] = ()
    """Columns that every training example must have; the first ones are the input."""
    input_columns: ClassVar[tuple[str, ...]] = ()
    """Columns that an item to be answered must have."""
    head: ClassVar[Head | None] = None
    """Which Hugging Face models `model.pretrained` opens; None: the task works with `model.factory` alone."""
    best_metric: ClassVar[tuple[str, bool]] = ("loss", False)
    """The score that `best` goes by unless the file says otherwise, and whether greater is better."""

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    @abstractmethod
    def build_processor(self, examples: Iterable[Example]) -> Processor:
        """Make the processor from the training examples (one pass): train a tokenizer, collect the labels."""

    @abstractmethod
    def load_processor(self, files: Mapping[str, bytes]) -> Processor:
        """Rebuild the processor from the files of a checkpoint."""

    @abstractmethod
    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        """Turn an example into features.

        Args:
            example: A row with `columns`, or with `input_columns` alone when `answer` is set.
            processor: This task's processor.
            answer: Encode an item to be answered: there is no target.

        Raises:
            eagleray.errors.DataError: The row cannot be used; the message says which column and value.
        """

    @abstractmethod
    def collate(self, rows: Sequence[Features], processor: Processor) -> Batch:
        """Pad rows to the longest of them and stack them."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Run the model on a batch and sum its loss (label smoothing included)."""

    @abstractmethod
    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        """Answer each item of a batch, in order. `options` holds what a request may set (`num_beams`, ...)."""

    @abstractmethod
    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        """Compare answers with the examples they belong to; the keys are metric names.

        A score of the examples of one `kind` alone is named `<metric>/<kind>`.
        """

    def score_signatures(self) -> dict[str, str]:
        """Return how metrics were computed where their authors ask to say so (sacrebleu), by metric name."""
        return {}

    def max_length(self, processor: Processor) -> int | None:
        """Return the longest item that can be answered, in the unit of `Encoded.length`; None: no limit."""
        return None

    def split(self, example: Example, processor: Processor) -> list[Example]:
        """Cut an item that is too long into items that `join` can put together again; one item: it cannot."""
        return [example]

    def join(self, example: Example, parts: Sequence[Example], answers: Sequence[Answer]) -> Answer:
        """Put the answers to the parts of an item together."""
        assert len(answers) == 1, "a task that splits items must join their answers"
        return answers[0]


def batching_itself(predict: Predict) -> Predict:
    """Mark a `predict` that may get more rows than one batch holds: it cuts them itself.

    Whoever overrides it without this mark gets batches within the limits.
    """
    predict.batches_itself = True  # type: ignore[attr-defined]
    return predict


def batches_itself(predict: Callable[..., Any]) -> bool:
    """Whether a `predict` may get more rows than one batch holds."""
    return getattr(predict, "batches_itself", False)


def move(batch: Batch, device: torch.device) -> Batch:
    """Copy a batch to a device.

    Raises:
        ConfigError: The task's `collate` returned something else than tensors.
    """
    for name, value in batch.items():
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"the task's collate returned {name} as {type(value).__name__}",
                "every value of a batch must be a tensor",
            )
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
