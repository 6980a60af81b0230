"""What text and image classification share: labels, loss, answers, scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.hub import read_model_config
from eagleray.tasks import rows
from eagleray.tasks.base import Answer, Batch, Example, Features, Loss, Processor, Task
from eagleray.tasks.scores import score_by_kind, score_classes


class ClassificationTask(Task):
    """One label of a fixed set for an item."""

    route: ClassVar[Literal["translate", "classify", "predict"]] = "classify"
    best_metric: ClassVar[tuple[str, bool]] = ("accuracy", True)

    @abstractmethod
    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Run the model and return the scores of the classes, shape (B, classes)."""

    def collate_labels(self, rows_: Sequence[Features]) -> Batch:
        """Return the labels of the rows, shape (B,); nothing for items to be answered."""
        if not rows_ or "label" not in rows_[0]:
            return {}
        return {"labels": torch.tensor([row["label"] for row in rows_], dtype=torch.int64)}

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Sum the cross entropy over examples, smoothed as in Szegedy et al. 2016 (arXiv 1512.00567)."""
        labels = batch["labels"]
        smoothing = self.config.train.label_smoothing_factor if self.config.train else 0.0
        logits = self.logits(model, batch).float()
        total = F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        return Loss(total, torch.tensor(len(labels), device=labels.device))

    @torch.no_grad()
    def predict(
        self, model: nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        """Give each item its most probable label and the probabilities of all."""
        probabilities = self.logits(model, batch).float().softmax(-1).cpu()
        return [_answer(row, processor.labels) for row in probabilities.tolist()]

    def score(self, answers: Sequence[Answer], examples: Sequence[Example]) -> dict[str, float]:
        """Return accuracy and macro F1, and both per kind."""
        labels = self.config.data.labels
        references = [_reference(example, labels) for example in examples]
        return score_by_kind(score_classes, answers, examples, answer_key="label", references=references)


def pretrained_labels(
    directory: Path, given: Sequence[str] | None, examples: Iterable[Example]
) -> tuple[str, ...]:
    """Return the labels of a pretrained classifier where they cover those of the data, else those of the data."""
    wanted = rows.collect_labels(given, examples)
    own = model_labels(directory)
    return own if set(wanted) <= set(own) else wanted


def model_labels(directory: Path) -> tuple[str, ...]:
    """Return the class names in a checkpoint's `config.json`, in the order of their numbers."""
    names: Mapping[str, str] = read_model_config(directory).get("id2label") or {}
    return tuple(str(names[number]) for number in sorted(names, key=int))


def _answer(probabilities: Sequence[float], labels: Sequence[str]) -> Answer:
    scores = dict(zip(labels, probabilities, strict=True))
    label = max(scores, key=scores.__getitem__)
    return {"label": label, "score": scores[label], "scores": scores}


def _reference(example: Example, labels: Sequence[str] | None) -> str:
    return labels[rows.label_number(example, labels)] if labels else rows.read_label(example)
