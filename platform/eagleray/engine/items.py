"""An item on its way through an engine: prepared, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from eagleray.tasks.base import Example, Features


@dataclass(frozen=True, slots=True)
class ItemError:
    """An item that could not be answered; the others of its batch were.

    Attributes:
        code: `invalid_item`: it cannot be used; `too_long`: it is longer than the model's limit and cannot be
            split; `model_failed`: the model raised on it.
        message: What happened, without the item: a server tells it to whoever asks.
        hint: What to do about it.
        detail: What a task said of the item, perhaps in the item's own words: for those alone whose item it is.
    """

    code: Literal["invalid_item", "too_long", "model_failed"]
    message: str
    hint: str | None = None
    detail: str | None = None

    def __str__(self) -> str:
        return self.message if self.detail is None else f"{self.message}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Prepared:
    """An item as the model takes it: in one part, or in several where a long text was split.

    Attributes:
        example: The item.
        parts: What the model is asked, each an item of its own.
        features: Encoded parts.
        lengths: Tokens of each part.
    """

    example: Example
    parts: tuple[Example, ...]
    features: tuple[Features, ...]
    lengths: tuple[int, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all parts: what admission counts."""
        return sum(self.lengths)
