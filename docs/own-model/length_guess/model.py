"""The model: any `torch.nn.Module`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from length_guess.task import LengthProcessor


class LengthModel(nn.Module):
    """Reads the bytes of a phrase and guesses a number of characters."""

    def __init__(self, d_model: int, mean: float, std: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(257, d_model, padding_idx=0)  # a byte plus one; 0 is padding
        self.mix = nn.Conv1d(d_model, d_model, kernel_size=5, padding=2)
        self.head = nn.Sequential(nn.Linear(2 * d_model, d_model), nn.GELU(), nn.Linear(d_model, 1))
        # Buffers travel in the checkpoint like parameters.
        self.register_buffer("mean", torch.tensor(mean))
        self.register_buffer("std", torch.tensor(std))

    def forward(self, text: Tensor) -> Tensor:
        """Guess lengths, shape (B,), from padded bytes, shape (B, S)."""
        mask = (text > 0).unsqueeze(-1)
        hidden = self.embed(text)
        hidden = (hidden + nn.functional.gelu(self.mix(hidden.transpose(1, 2)).transpose(1, 2))) * mask
        total = hidden.sum(1)
        features = torch.cat([total / mask.sum(1), total / 32], dim=-1)
        return self.head(features).squeeze(-1) * self.std + self.mean


def build(d_model: int, processor: LengthProcessor) -> LengthModel:
    """Build the model from `model.config` of the file; a factory may also ask for the task's processor."""
    return LengthModel(d_model, processor.mean, processor.std)
