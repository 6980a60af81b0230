"""What a model's routes ask of whatever answers: one engine, several versions of a model, a fleet of replicas."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from eagleray_serving.schema import WireError

# What the failure of a request's only item is; else 422.
ITEM_STATUSES = {"too_long": 413, "model_failed": 500}


@dataclass(frozen=True, slots=True)
class Asking:
    """Who asks; crosses processes with the request.

    Attributes:
        request_id: The same in every process, log and retry that a request touches.
        lane: Interactive items go first.
        key: Name of the key that asks.
    """

    request_id: str
    lane: Literal["interactive", "bulk"] = "interactive"
    key: str | None = None


@dataclass(frozen=True, slots=True)
class ItemFailure:
    """An item that could not be answered, in the place of its answer."""

    code: str
    message: str
    hint: str | None = None

    def as_error(self) -> WireError:
        """Return what it is where the item is all of the request."""
        return WireError(ITEM_STATUSES.get(self.code, 422), self.code, self.message, self.hint)


Answered = Mapping[str, Any] | ItemFailure


@dataclass(frozen=True, slots=True)
class Answers:
    """What a request gets.

    Attributes:
        version: The version that answered all of it.
        items: Answers in the order of the items.
        num_tokens: Tokens of the input, which a key is charged for.
        is_whole: Whether it is all; what a stream gives before its end is not.
    """

    version: str
    items: Sequence[Answered]
    num_tokens: int = 0
    is_whole: bool = True


class Answerer(Protocol):
    """A loaded model behind its batcher."""

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        """Answer each item for itself, in order.

        Raises:
            WireError: 429, too much is waiting; 413, the request alone is more than the model admits.
        """

    def stream(
        self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking
    ) -> AsyncGenerator[Answers, None]:
        """Yield the answer to one item as it grows, at last all of it.

        Raises:
            WireError: As `answer`.
        """
