"""Greedy decoding: the token with the highest score."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eagleray.engine.decoder.rules import DecodingRules


@dataclass(slots=True)
class GreedyRow:
    """A row that runs.

    Attributes:
        ticket: Whose it is.
        tokens: What it has generated.
        is_done: Whether it has ended.
    """

    ticket: int
    tokens: list[int] = field(default_factory=list)
    is_done: bool = False

    @property
    def age(self) -> int:
        """Tokens generated."""
        return len(self.tokens)

    def so_far(self) -> list[int]:
        """Return what it has generated."""
        return list(self.tokens)

    def best(self) -> list[int]:
        """Return the answer."""
        return self.tokens


class Greedy:
    """Chooses the next token of every row.

    Args:
        rules: What may be chosen.
    """

    def __init__(self, rules: DecodingRules) -> None:
        self._rules = rules

    def open(self, ticket: int) -> GreedyRow:
        """Return a row that has generated nothing."""
        return GreedyRow(ticket)

    def choose(self, scores_NV: Tensor, rows: Sequence[GreedyRow]) -> tuple[Tensor, None]:
        """Advance the rows; return their new tokens, shape (N,)."""
        self._rules.restrict(scores_NV[:, None], [row.age for row in rows])
        tokens_N = _argmax(scores_NV)
        for row, token in zip(rows, tokens_N.tolist(), strict=True):
            row.is_done = token in self._rules.eos_token_ids or self._rules.is_last(row.age)
            row.tokens.append(token)
        return tokens_N, None


def _argmax(scores_NV: Tensor) -> Tensor:
    if scores_NV.device.type != "cpu":
        return scores_NV.argmax(-1)
    # numpy compares many numbers at once, which torch does not.
    return torch.from_numpy(scores_NV.numpy().argmax(-1))
