"""Computing a model's output projection only where there is a label.

The rows of a batch are padded to the longest target, and the projection to the vocabulary is as large as several
layers: of the 111 ms that a step of the shipped translator takes, 27 were spent on padding there. The loss does
not depend on it, nor does any gradient. The positions are chosen in front of the projection, where the hidden
states are whole in every layout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import Tensor, nn

_WANTED: ContextVar[Tensor | None] = ContextVar("wanted", default=None)


def choose_before_projecting(model: nn.Module) -> None:
    """Have a model with output embeddings heed `projecting_only`; others stay as they are.

    Not for a model that is compiled, whose shapes would change at every step, nor on a GPU, where counting
    positions waits for all that is queued.
    """
    find = getattr(model, "get_output_embeddings", None)
    projection = find() if find is not None else None
    if projection is not None:
        projection.register_forward_pre_hook(_choose)


@contextmanager
def projecting_only(wanted: Tensor) -> Iterator[None]:
    """Have the models that are called meanwhile project only some positions.

    Args:
        wanted: Whether a position is projected, of the flattened (B, T) positions, bool, shape (B * T,). Logits of
            models that heed it have the shape (N, V) with the N positions that are, of others still (B, T, V).
    """
    token = _WANTED.set(wanted)
    try:
        yield
    finally:
        _WANTED.reset(token)


def _choose(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
    wanted = _WANTED.get()
    if wanted is None:
        return None
    hidden, *others = args
    return (hidden.flatten(0, 1).index_select(0, wanted.nonzero().squeeze(1)), *others)
