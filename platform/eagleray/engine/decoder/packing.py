"""Rows of different lengths behind each other: what has no padding is not computed."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor


class Packing:
    """Source rows as one sequence of tokens. Attention alone sees them padded.

    N: tokens of all rows, R: rows, S: tokens of the longest row.

    Args:
        sources: Tokens of each row, none of them empty.
        device: Where the tensors are.
    """

    def __init__(self, sources: Sequence[Sequence[int]], device: torch.device) -> None:
        self.lengths = [len(source) for source in sources]
        self.num_rows = len(sources)
        self.longest = max(self.lengths)
        self.is_even = min(self.lengths) == self.longest
        self._device = device
        self.tokens_N = torch.tensor([token for source in sources for token in source], device=device)

    @cached_property
    def places_N(self) -> Tensor:
        """Place of each token in its row."""
        return torch.cat([torch.arange(length, device=self._device) for length in self.lengths])

    @cached_property
    def slots_N(self) -> Tensor:
        """Place of each token in the padded rows, flat."""
        starts = torch.arange(self.num_rows, device=self._device) * self.longest
        return self.places_N + starts.repeat_interleave(torch.tensor(self.lengths, device=self._device))

    @cached_property
    def _sources(self) -> Tensor:
        """Which token stands at each padded place; where there is none, the first one of all."""
        index = torch.zeros(self.num_rows * self.longest, dtype=torch.int64, device=self._device)
        index[self.slots_N] = torch.arange(len(self.tokens_N), device=self._device)
        return index

    def pad(self, packed: Tensor) -> Tensor:
        """Return padded rows, shape (R * S, ...); padding holds some other token's values."""
        return packed if self.is_even else packed.index_select(0, self._sources)

    def unpad(self, padded: Tensor) -> Tensor:
        """Return the packed tokens of padded rows, shape (N, ...)."""
        return padded if self.is_even else padded.index_select(0, self.slots_N)

    def mask(self, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return what hides padding from attention, with a bias added, shape (R or 1, 1 or H, S or 1, S)."""
        if self.is_even:
            return bias
        lengths = torch.tensor(self.lengths, device=self._device)
        hidden = torch.arange(self.longest, device=self._device) >= lengths[:, None]
        mask = torch.zeros(hidden.shape, dtype=dtype, device=self._device).masked_fill_(hidden, float("-inf"))
        return mask[:, None, None] if bias is None else bias + mask[:, None, None]
