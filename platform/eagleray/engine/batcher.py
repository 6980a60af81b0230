"""Batching of items that arrive one by one. Plain asyncio: knows no model, no Ray and no HTTP.

While the model is busy, items gather; when it has room again, the next ones are chosen among all that wait. So
the batches grow with the load, and an item that meets an idle model waits for nobody. A model that decodes step by
step takes items in while others are in work (continuous batching: Yu et al. 2022, OSDI 22).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from itertools import chain
from typing import Any, Generic, TypeVar

from eagleray.engine.plan import BatchLimits, choose_batch
from eagleray.engine.work import Ended, Entering, Start, Work
from eagleray.errors import ModelStoppedError, RequestTimeoutError

__all__ = ["BatchLimits", "Batcher", "Lane"]

logger = logging.getLogger(__name__)

RESERVED_SHARE = 8
"""Of so many slots of a model that takes more, one is left free by bulk items, for interactive ones."""

T = TypeVar("T")
R = TypeVar("R")


class Lane(IntEnum):
    """Who waits for an answer; interactive items go first."""

    INTERACTIVE = 0
    BULK = 1


@dataclass(slots=True, eq=False)
class _Request(Generic[T, R]):
    """An item in the queue or in work."""

    key: int
    item: T
    num_tokens: int
    options: Mapping[str, Any]
    lane: Lane
    on_partial: Callable[[Any], None] | None
    future: asyncio.Future[R] = field(repr=False)

    def entering(self) -> Entering[T]:
        return Entering(self.key, self.item, self.lane is Lane.INTERACTIVE, self.on_partial)


class Batcher(Generic[T, R]):
    """Gathers items while the model is busy and answers each for itself.

    Args:
        start: Puts the model to work under some options; one work is advanced at a time.
        limits: What may be in work at once.
        bulk_share: Of so many choices in a row, one is led by the oldest bulk item, if there is one.
        on_step: Told the items and the tokens that are in work, whenever the model is put to it.
    """

    def __init__(
        self,
        start: Start[T, R],
        limits: BatchLimits,
        *,
        bulk_share: int = 4,
        on_step: Callable[[int, int], None] = lambda num_items, num_tokens: None,
    ) -> None:
        self._start = start
        self._on_step = on_step
        self._limits = limits
        self._bulk_share = bulk_share
        self._choices_since_bulk = 0
        self._num_keys = 0
        # In the order of arrival.
        self._waiting: dict[Lane, dict[_Request[T, R], None]] = {lane: {} for lane in Lane}
        self._running: dict[int, _Request[T, R]] = {}
        self._num_queued_tokens = 0
        self._num_running_tokens = 0
        self._arrived = asyncio.Event()
        self._loop_task: asyncio.Task[None] | None = None
        self._closed = False
        self._work: tuple[Mapping[str, Any], Work[T, R]] | None = None
        self._advancing_since_s: float | None = None

    @property
    def num_queued_items(self) -> int:
        """Items that wait and are not yet in work."""
        return sum(map(len, self._waiting.values()))

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait and are not yet in work: what admission compares with its budget."""
        return self._num_queued_tokens

    @property
    def num_running_tokens(self) -> int:
        """Tokens in work."""
        return self._num_running_tokens

    @property
    def busy_s(self) -> float:
        """Seconds since the model last let go of the loop; 0 while it is idle. What a health check looks at."""
        if self._advancing_since_s is None:
            return 0.0
        return asyncio.get_running_loop().time() - self._advancing_since_s

    def trouble(self, limit_s: float) -> str | None:
        """Return why nobody here can expect an answer; None while all is well.

        Args:
            limit_s: Longest time in which the model must let go of the loop.
        """
        if self.busy_s > limit_s:
            return f"the model has been at one batch for {self.busy_s:.0f} s; the limit is {limit_s:g} s"
        if self._loop_task is not None and self._loop_task.done() and not self._closed:
            return "the batcher's loop has ended"
        return None

    async def submit(
        self,
        item: T,
        *,
        num_tokens: int,
        options: Mapping[str, Any] | None = None,
        lane: Lane = Lane.INTERACTIVE,
        timeout_s: float | None = None,
        on_partial: Callable[[Any], None] | None = None,
    ) -> R:
        """Wait for the result of an item. Cancelling the call drops the item, also while it is in work.

        Args:
            item: What the model is asked.
            num_tokens: Its length.
            options: Only items of equal options are in work together.
            lane: Interactive items go first.
            timeout_s: Seconds after which the caller gives up; None: never.
            on_partial: Told the result as far as it is known, in the model's thread, where the model can tell.

        Raises:
            RequestTimeoutError: The time was over.
            ModelStoppedError: The batcher was closed.
            Exception: What the model raised on this item.
        """
        if self._closed:
            raise ModelStoppedError("the model is being stopped", "send the request to another replica")
        loop = asyncio.get_running_loop()
        self._num_keys += 1
        request = _Request[T, R](
            self._num_keys, item, num_tokens, dict(options or {}), lane, on_partial, loop.create_future()
        )
        self._waiting[lane][request] = None
        self._num_queued_tokens += num_tokens
        self._arrived.set()
        self._hurry()
        if self._loop_task is None or self._loop_task.done():
            self._loop_task = loop.create_task(self._serve(), name="eagleray-batcher")
        try:
            if timeout_s is None:
                return await request.future
            async with asyncio.timeout(timeout_s):
                return await request.future
        except TimeoutError:
            if not request.future.cancelled():  # the model itself raised a TimeoutError
                raise
            raise RequestTimeoutError(
                f"no answer within {timeout_s:g} s", "send fewer items, or try again"
            ) from None
        finally:
            self._forget(request)
            if request.key in self._running:
                self._hurry()  # nobody waits for it any more

    async def close(self) -> None:
        """Answer what is in work, refuse what waits, and end."""
        self._closed = True
        for request in [request for lane in self._waiting.values() for request in lane]:
            self._forget(request)
            _fail(request, ModelStoppedError("the model was stopped before it answered"))
        self._arrived.set()
        if self._loop_task is not None:
            await self._loop_task

    async def _serve(self) -> None:
        """Keep the model at work until the batcher is closed."""
        while not self._closed:
            await self._arrived.wait()
            self._arrived.clear()
            while not self._closed and (leader := self._lead()):
                await self._work_through(leader)

    async def _work_through(self, leader: _Request[T, R]) -> None:
        """Put an item to work, and those that may join it, until none is left: schedule, run, settle."""
        options = leader.options
        try:
            work = self._work_under(options)
            while (entering := self._choose(options)) or self._running:
                leaving = self._let_in(entering)
                self._on_step(len(self._running), self._num_running_tokens)
                self._advancing_since_s = asyncio.get_running_loop().time()
                for ended in await work.advance([request.entering() for request in entering], leaving):
                    self._settle(ended)
        except BaseException as error:
            # Ours, or the end of the event loop: whoever waits must hear of it, and the loop must go on.
            self._work = None
            stopped = ModelStoppedError("the model was stopped before it answered")
            for request in [*self._running.values()] or [leader]:
                self._forget(request)
                _fail(request, error if isinstance(error, Exception) else stopped)
            self._running.clear()
            if not isinstance(error, Exception):
                raise
            logger.exception("the model failed on everything that was in work")
        finally:
            self._advancing_since_s = None
            self._num_running_tokens = 0

    def _work_under(self, options: Mapping[str, Any]) -> Work[T, R]:
        if self._work is None or self._work[0] != options:
            self._work = (options, self._start(options))
        return self._work[1]

    def _let_in(self, entering: Sequence[_Request[T, R]]) -> list[int]:
        """Count items as in work; return the keys of those in work that nobody waits for."""
        leaving = [key for key, request in self._running.items() if request.future.done()]
        for key in leaving:
            self._num_running_tokens -= self._running.pop(key).num_tokens
        for request in entering:
            self._running[request.key] = request
            self._num_running_tokens += request.num_tokens
        return leaving

    def _settle(self, ended: Ended[R]) -> None:
        request = self._running.pop(ended.key)
        self._num_running_tokens -= request.num_tokens
        if request.future.done():
            return
        if ended.error is not None:
            request.future.set_exception(ended.error)
        else:
            request.future.set_result(ended.result)  # type: ignore[arg-type]

    def _choose(self, options: Mapping[str, Any]) -> list[_Request[T, R]]:
        """Take those out of the queue that begin now: none while the one that is to lead has other options."""
        leader = self._lead()
        if leader is None or leader.options != options or self._closed:
            return []
        limits, present = self._limits_of(leader.lane), [each.num_tokens for each in self._running.values()]
        if not choose_batch([leader.num_tokens], [0], limits, present=present):
            return []  # full: the others need not be looked at
        candidates = [leader, *self._mates(leader)]
        chosen = choose_batch(
            [request.num_tokens for request in candidates],
            [abs(request.lane - leader.lane) for request in candidates],
            limits,
            present=present,
        )
        entering = [candidates[index] for index in chosen]
        for request in entering:
            self._forget(request)
        if entering:
            self._count_choice(leader.lane)
        return entering

    def _mates(self, leader: _Request[T, R]) -> Iterator[_Request[T, R]]:
        """Yield those that may share a batch with an item, in the order of their arrival.

        Bulk items make a batch longer: where nobody leaves one before its end, interactive items do without them.
        """
        is_whole = self._work is not None and not self._work[1].takes_more
        lanes = [Lane.INTERACTIVE] if is_whole and leader.lane is Lane.INTERACTIVE else list(Lane)
        for request in chain.from_iterable(self._waiting[lane] for lane in lanes):
            if request is not leader and request.options == leader.options and not request.future.done():
                yield request

    def _limits_of(self, lane: Lane) -> BatchLimits:
        """Return what may be in work at once when an item of this lane leads."""
        is_full_soon = lane is Lane.BULK and self._work is not None and self._work[1].takes_more
        return self._limits.less(self._limits.max_items // RESERVED_SHARE) if is_full_soon else self._limits

    def _lead(self) -> _Request[T, R] | None:
        """Return the oldest interactive item, or the oldest bulk item when its turn has come."""
        bulk, interactive = self._oldest(Lane.BULK), self._oldest(Lane.INTERACTIVE)
        due = interactive is None or self._choices_since_bulk + 1 >= self._bulk_share
        return bulk if bulk is not None and due else interactive

    def _oldest(self, lane: Lane) -> _Request[T, R] | None:
        """Return the first of a lane for which somebody still waits."""
        while oldest := next(iter(self._waiting[lane]), None):
            if not oldest.future.done():
                break
            self._forget(oldest)
        return oldest

    def _count_choice(self, lane: Lane) -> None:
        if lane is Lane.BULK:
            self._choices_since_bulk = 0
        elif self._waiting[Lane.BULK]:
            self._choices_since_bulk += 1

    def _forget(self, request: _Request[T, R]) -> None:
        if request in self._waiting[request.lane]:
            del self._waiting[request.lane][request]
            self._num_queued_tokens -= request.num_tokens

    def _hurry(self) -> None:
        if self._advancing_since_s is not None and self._work is not None:
            self._work[1].hurry()


def _fail(request: _Request[Any, Any], error: Exception) -> None:
    if not request.future.done():
        request.future.set_exception(error)
