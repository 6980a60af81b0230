"""Items in work: the seam between the batcher and a model."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Entering(Generic[T]):
    """An item that is let in.

    Attributes:
        key: By which its end is known.
        item: What the model is asked.
        at_once: It goes before those that are in work but have not begun.
        on_partial: Told what is known of its result so far, in the model's thread, where the model can tell.
    """

    key: int
    item: T
    at_once: bool = False
    on_partial: Callable[[Any], None] | None = None


@dataclass(frozen=True, slots=True)
class Ended(Generic[R]):
    """An item that has its result, or its error."""

    key: int
    result: R | None = None
    error: Exception | None = None


class Work(Protocol[T, R]):
    """A model at work under one set of options."""

    takes_more: bool
    """Whether items may enter while others are in work."""

    async def advance(self, entering: Sequence[Entering[T]], leaving: Collection[int]) -> Sequence[Ended[R]]:
        """Let items in and go on until one ends, or `hurry` was called.

        Args:
            entering: Items that begin.
            leaving: Keys of items that nobody waits for any more.
        """
        ...

    def hurry(self) -> None:
        """Let the running `advance` return soon: somebody waits to enter or wishes to leave."""
        ...


Start = Callable[[Mapping[str, Any]], Work[T, R]]
"""From options to a model at work under them."""

Run = Callable[[Sequence[T], Mapping[str, Any]], Awaitable[Sequence[R]]]
"""Answers a batch under its options, one result per item, in order."""


class BatchWork(Generic[T, R]):
    """A model that answers a batch as a whole.

    Args:
        run: Answers a batch; only one call is made at a time.
        options: Its options.
    """

    takes_more = False

    def __init__(self, run: Run[T, R], options: Mapping[str, Any]) -> None:
        self._run, self._options = run, options

    async def advance(self, entering: Sequence[Entering[T]], leaving: Collection[int]) -> Sequence[Ended[R]]:
        """Answer a batch; when it fails, its halves, so that only the item at fault fails."""
        try:
            results = await self._run([each.item for each in entering], self._options)
            if len(results) != len(entering):
                raise RuntimeError(f"the model gave {len(results)} results for {len(entering)} items")
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # A cancellation that comes out of the model is its failure like any other.
            if len(entering) == 1:
                failure = error if isinstance(error, Exception) else RuntimeError("the model was cancelled")
                return [Ended(entering[0].key, error=failure)]
            logger.warning("a batch of %d items failed (%s); its halves are tried", len(entering), error)
            half = len(entering) // 2
            return [*await self.advance(entering[:half], ()), *await self.advance(entering[half:], ())]
        return [Ended(each.key, result) for each, result in zip(entering, results, strict=True)]

    def hurry(self) -> None:
        """Do nothing: a batch runs to its end."""


def in_batches(run: Run[T, R]) -> Start[T, R]:
    """Return how a function of a batch is put to work."""
    return lambda options: BatchWork(run, options)
