"""A user's own module, which three heads keep from being cut in two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from eagleray.parallel import ParallelPlan


class Reader(nn.Module):
    """A bag of words."""

    def __init__(self, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, 12)
        self.head = nn.Linear(12, num_labels)

    def parallel_plan(self) -> ParallelPlan:
        """Say how it can be cut."""
        return ParallelPlan(tensor={"embed": "vocab"}, divisible={"heads": 3})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Return logits, shape (batch, labels)."""
        return SequenceClassifierOutput(logits=self.head(self.embed(input_ids).mean(1)))


def build(processor: Any) -> nn.Module:
    """Build it for the data's words and labels."""
    with torch.device("meta"):
        return Reader(len(processor.tokenizer), len(processor.labels))
