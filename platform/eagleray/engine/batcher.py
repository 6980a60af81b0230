"""Batching of items that arrive one by one. Plain asyncio: knows no model, no Ray and no HTTP.

While a batch runs, items gather; when it ends, the next batch is chosen among all that wait. So the batches grow
with the load, and an item that meets an idle model waits for nobody.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Generic, TypeVar

from eagleray.engine.plan import BatchLimits, choose_batch
from eagleray.errors import ModelStoppedError, RequestTimeoutError

__all__ = ["BatchLimits", "Batcher", "Lane"]

logger = logging.getLogger(__name__)

T = TypeVar("T")
R = TypeVar("R")


class Lane(IntEnum):
    """Who waits for an answer; interactive items go first."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(slots=True, eq=False)
class _Waiting(Generic[T, R]):
    """An item in the queue."""

    item: T
    num_tokens: int
    options: Mapping[str, Any]
    lane: Lane
    future: asyncio.Future[R] = field(repr=False)


class Batcher(Generic[T, R]):
    """Gathers items while the model is busy and answers each for itself.

    Args:
        run: Answers a batch under its options, one result per item, in order; only one call is made at a time.
        limits: What a batch may hold.
        bulk_share: Of so many batches in a row, one is led by the oldest bulk item, if there is one.
    """

    def __init__(
        self,
        run: Callable[[Sequence[T], Mapping[str, Any]], Awaitable[Sequence[R]]],
        limits: BatchLimits,
        *,
        bulk_share: int = 4,
    ) -> None:
        self._run = run
        self._limits = limits
        self._bulk_share = bulk_share
        self._batches_since_bulk = 0
        self._waiting: dict[_Waiting[T, R], None] = {}  # in the order of arrival
        self._num_queued_tokens = 0
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def num_queued_items(self) -> int:
        """Items that wait and are not yet running."""
        return len(self._waiting)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait and are not yet running: what admission compares with its budget."""
        return self._num_queued_tokens

    async def submit(
        self,
        item: T,
        *,
        num_tokens: int,
        options: Mapping[str, Any] | None = None,
        lane: Lane = Lane.INTERACTIVE,
        timeout_s: float | None = None,
    ) -> R:
        """Wait for the result of an item. Cancelling the call drops the item if it is not yet running.

        Args:
            item: What the model is asked.
            num_tokens: Its length.
            options: Only items of equal options share a batch.
            lane: Interactive items go first.
            timeout_s: Seconds after which the caller gives up; None: never.

        Raises:
            RequestTimeoutError: The time was over.
            ModelStoppedError: The batcher was closed.
            Exception: What the model raised on this item.
        """
        if self._closed:
            raise ModelStoppedError("the model is being stopped", "send the request to another replica")
        loop = asyncio.get_running_loop()
        waiting = _Waiting[T, R](item, num_tokens, dict(options or {}), lane, loop.create_future())
        self._waiting[waiting] = None
        self._num_queued_tokens += num_tokens
        self._arrived.set()
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = loop.create_task(self._serve(), name="eagleray-batcher")
        try:
            async with asyncio.timeout(timeout_s):
                return await waiting.future
        except TimeoutError:
            if not waiting.future.cancelled():  # the model itself raised a TimeoutError
                raise
            raise RequestTimeoutError(
                f"no answer within {timeout_s:g} s", "send fewer items, or try again"
            ) from None
        finally:
            self._remove(waiting)

    async def close(self) -> None:
        """Answer what runs, refuse what waits, and end."""
        self._closed = True
        for waiting in list(self._waiting):
            self._remove(waiting)
            _fail(waiting, ModelStoppedError("the model was stopped before it answered"))
        self._arrived.set()
        if self._loop_task is not None:
            await self._loop_task

    async def _serve(self) -> None:
        """Run one batch after the other until the batcher is closed."""
        while not self._closed:
            await self._arrived.wait()
            self._arrived.clear()
            while batch := self._take():
                await self._answer(batch)

    def _take(self) -> list[_Waiting[T, R]]:
        """Take the next batch out of the queue: schedule."""
        for waiting in [waiting for waiting in self._waiting if waiting.future.done()]:
            self._remove(waiting)
        if not self._waiting:
            return []
        leader = self._lead()
        mates = [w for w in self._waiting if w is not leader and w.options == leader.options]
        candidates = [leader, *mates]
        chosen = choose_batch(
            [waiting.num_tokens for waiting in candidates],
            [abs(waiting.lane - leader.lane) for waiting in candidates],
            self._limits,
        )
        batch = [candidates[index] for index in chosen]
        for waiting in batch:
            self._remove(waiting)
        return batch

    def _remove(self, waiting: _Waiting[T, R]) -> None:
        if waiting in self._waiting:
            del self._waiting[waiting]
            self._num_queued_tokens -= waiting.num_tokens

    def _lead(self) -> _Waiting[T, R]:
        """Return the oldest interactive item, or the oldest bulk item when its turn has come."""
        oldest = {waiting.lane: waiting for waiting in reversed(self._waiting)}  # the last one written wins
        bulk, interactive = oldest.get(Lane.BULK), oldest.get(Lane.INTERACTIVE)
        due = interactive is None or self._batches_since_bulk + 1 >= self._bulk_share
        if bulk is not None and due:
            self._batches_since_bulk = 0
            return bulk
        assert interactive is not None, "a lane is empty only if the other one is not"
        self._batches_since_bulk += bulk is not None
        return interactive

    async def _answer(self, batch: Sequence[_Waiting[T, R]]) -> None:
        """Run a batch; when it fails, its halves, so that only the item at fault fails."""
        try:
            results = await self._run([waiting.item for waiting in batch], batch[0].options)
            if len(results) != len(batch):
                raise RuntimeError(f"the model gave {len(results)} results for {len(batch)} items")
        except (Exception, asyncio.CancelledError) as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                for waiting in batch:
                    _fail(waiting, ModelStoppedError("the model was stopped before it answered"))
                raise
            # A cancellation that comes out of the model is its failure like any other.
            if len(batch) == 1:
                failure = error if isinstance(error, Exception) else RuntimeError("the model was cancelled")
                _fail(batch[0], failure)
                return
            logger.warning("a batch of %d items failed (%s); its halves are tried", len(batch), error)
            half = len(batch) // 2
            await self._answer(batch[:half])
            await self._answer(batch[half:])
        else:
            for waiting, result in zip(batch, results, strict=True):
                if not waiting.future.done():
                    waiting.future.set_result(result)


def _fail(waiting: _Waiting[Any, Any], error: Exception) -> None:
    if not waiting.future.done():
        waiting.future.set_exception(error)
