"""A user's own module with dropout; a worker that has it needs no Hugging Face model, and is there sooner."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import SequenceClassifierOutput

from eagleray.parallel import ParallelPlan

WIDTH, NUM_LAYERS, DROPOUT = 16, 3, 0.1


class Layer(nn.Module):
    """A residual layer of each word alone."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the words with what the layer adds."""
        hidden = nn.functional.gelu(self.up(self.norm(x_BTD)))
        return x_BTD + self.dropout(self.down(hidden))


class Encoder(nn.Module):
    """Layers, and the mean of the words."""

    def __init__(self, vocab_size: int, num_labels: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.head = nn.Linear(WIDTH, num_labels)

    def parallel_plan(self) -> ParallelPlan:
        """Say how it can be cut."""
        return ParallelPlan(layers=("layers",), tensor={"layers.*.up": "colwise", "layers.*.down": "rowwise"})

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> SequenceClassifierOutput:
        """Return logits, shape (batch, labels)."""
        x_BTD = self.embed(input_ids)
        for layer in self.layers:
            x_BTD = layer(x_BTD)
        shown = attention_mask.unsqueeze(-1).to(x_BTD.dtype)
        return SequenceClassifierOutput(logits=self.head((x_BTD * shown).sum(1) / shown.sum(1)))


def build(processor: Any) -> nn.Module:
    """Build it for the data's words and labels."""
    with torch.device("meta"):
        return Encoder(len(processor.tokenizer), len(processor.labels))
