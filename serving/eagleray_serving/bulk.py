"""One large request over many replicas: cut by tokens, spread, merged in order. Plain asyncio: no Ray, no HTTP.

A chunk whose replica dies is asked again elsewhere. One that keeps losing its replicas is cut in halves, which run
alone, until the item at fault is known; that item fails, its neighbours are answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Collection,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from eagleray_serving.admission import DrainRate, overloaded
from eagleray_serving.answering import Answered, Answers, ItemFailure
from eagleray_serving.chunks import BulkLimits, Chunk, Pace, estimate_tokens, split_off
from eagleray_serving.schema import WireError

# Chunks that may be finished before the one in front of them, for each that may be in flight.
AHEAD = 4
# Rounds in which parts of another version are asked again.
MAX_VERSION_ROUNDS = 5
VERSION_PAUSE_S = 0.5
MAX_PAUSE_S = 5.0
NOT_NOW = (429, 503)

Item = Mapping[str, Any]


class ReplicaDiedError(Exception):
    """The replica that had a chunk is gone, or gave no answer in time."""


class Ask(Protocol):
    """A way to some replica of the model."""

    async def __call__(self, items: Sequence[Item], waiting_tokens: int) -> Answers:
        """Let one replica answer a chunk.

        Args:
            items: The chunk.
            waiting_tokens: A replica's share of what the request still holds back, for autoscaling.

        Raises:
            ReplicaDiedError: It is gone.
            WireError: 429 or 503: not now; anything else: never.
        """


@dataclass(frozen=True, slots=True)
class Part:
    """Answers in a row.

    Attributes:
        start: Index of the first item.
        items: The answers.
        version: What answered; None where nothing could.
        num_tokens: Tokens of the input.
    """

    start: int
    items: Sequence[Answered]
    version: str | None
    num_tokens: int = 0


class Window:
    """The chunks of all bulk requests to one model that may be in flight: as many as its running replicas want.

    Args:
        count_replicas: Says how many replicas run.
        per_replica: Chunks for each: one that runs and one that waits keep a replica busy.
        max_requests: Bulk requests at once; the next one is refused.
    """

    def __init__(
        self, count_replicas: Callable[[], Awaitable[int]], *, per_replica: int = 2, max_requests: int = 8
    ) -> None:
        self._count_replicas = count_replicas
        self._per_replica = per_replica
        self._max_requests = max_requests
        self._waiting: deque[asyncio.Future[None]] = deque()
        self._rate = DrainRate()
        self.pace = Pace()
        self.num_replicas = 1
        self.num_in_flight = 0
        self.num_requests = 0
        self.num_waiting_tokens = 0

    @property
    def capacity(self) -> int:
        """Chunks that may be in flight."""
        return self._per_replica * self.num_replicas

    @contextmanager
    def request(self, num_tokens: int) -> Iterator[None]:
        """Hold the place of a whole request.

        Raises:
            WireError: 429, too many run.
        """
        if self.num_requests >= self._max_requests:
            raise overloaded(
                f"{self.num_requests} bulk requests are running; the limit is {self._max_requests}",
                self._rate.seconds_for(self.num_waiting_tokens / self.num_requests),
            )
        self.num_requests += 1
        self.num_waiting_tokens += num_tokens
        try:
            yield
        finally:
            self.num_requests -= 1

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for the place of a chunk and hold it."""
        self.num_replicas = max(1, await self._count_replicas())
        self._wake()
        while self.num_in_flight >= self.capacity:
            turn = asyncio.get_running_loop().create_future()
            self._waiting.append(turn)
            try:
                await turn
            finally:
                with suppress(ValueError):
                    self._waiting.remove(turn)
        if self.num_in_flight == 0:
            self.pace.begin()
        self.num_in_flight += 1
        try:
            yield
        finally:
            self.num_in_flight -= 1
            self._wake()

    def settle(self, num_tokens: int, *, answered: bool) -> None:
        """Note that tokens of a request no longer wait."""
        self.num_waiting_tokens -= num_tokens
        if answered:
            self._rate.add(num_tokens)
            self.pace.add(num_tokens / self.num_replicas)

    def _wake(self) -> None:
        for turn in [turn for turn in self._waiting if not turn.done()][: self.capacity - self.num_in_flight]:
            turn.set_result(None)


class Bulk:
    """One request's items, spread over the replicas of a model.

    Args:
        items: The items.
        ask: The way to a replica.
        window: What limits the chunks in flight.
        limits: How the items are cut.
    """

    def __init__(self, items: Sequence[Item], ask: Ask, window: Window, limits: BulkLimits) -> None:
        self._items = items
        self._ask = ask
        self._window = window
        self._limits = limits
        self._tokens_before = [0, *accumulate(estimate_tokens(item) for item in items)]
        self._chunks = [Chunk(0, len(items))] if items else []
        self._num_unsettled = 0  # tokens that the window still counts

    async def parts(self) -> AsyncGenerator[Part, None]:
        """Yield the answers in order, as early as can be; a slow reader slows the request down.

        Raises:
            WireError: The request is refused, or cannot be answered.
        """
        held: dict[int, Part] = {}
        position = 0
        with self._admitted():
            found = self._answer(self._chunks, lambda: len(held) < AHEAD * self._window.capacity)
            async with aclosing(found):
                async for part in found:
                    held[part.start] = part
                    while (following := held.pop(position, None)) is not None:
                        position += len(following.items)
                        yield following

    async def whole(self) -> Answers:
        """Return all answers, of one version: parts of another one are asked again.

        Raises:
            WireError: The request is refused, or cannot be answered; 503, the version changed again and again.
        """
        parts: dict[int, Part] = {}
        chunks, version = self._chunks, None
        with self._admitted():
            for pause_s in (VERSION_PAUSE_S * number for number in range(MAX_VERSION_ROUNDS)):
                await asyncio.sleep(pause_s)
                found = self._answer(chunks, lambda: True)
                async with aclosing(found):
                    async for part in found:
                        parts[part.start] = part
                        version = part.version or version
                chunks = [
                    Chunk(part.start, part.start + len(part.items))
                    for part in parts.values()
                    if part.version not in (version, None)
                ]
                if not chunks and version is not None:
                    ordered = [parts[start] for start in sorted(parts)]
                    items = [item for part in ordered for item in part.items]
                    return Answers(version, items, sum(part.num_tokens for part in ordered))
                if version is None:
                    raise WireError(500, "model_failed", "every item of the request ended its replica")
        raise WireError(
            503, "version_changed", "the model's version changed while it answered", "try again", retry_after_s=5
        )

    @contextmanager
    def _admitted(self) -> Iterator[None]:
        with self._window.request(self._tokens_before[-1]):
            self._num_unsettled = self._tokens_before[-1]
            try:
                yield
            finally:
                self._window.settle(self._num_unsettled, answered=False)

    async def _answer(
        self, chunks: Sequence[Chunk], may_run_ahead: Callable[[], bool]
    ) -> AsyncGenerator[Part, None]:
        """Yield the parts of chunks in the order in which they are answered."""
        queue = deque(chunks)
        running: dict[asyncio.Task[Answers], Chunk] = {}
        try:
            while queue or running:
                while queue and self._may_start(queue[0], running.values(), may_run_ahead):
                    chunk = self._take(queue)
                    waiting = sum(self._tokens(each) for each in queue) // self._window.num_replicas
                    running[asyncio.create_task(self._run(chunk, waiting))] = chunk
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    chunk = running.pop(task)
                    try:
                        answers = task.result()
                    except ReplicaDiedError as error:
                        again = chunk.after_death()
                        queue.extendleft(reversed(again))
                        if not again:
                            self._settle(chunk, answered=False)
                            yield Part(chunk.start, [_failure(error)], None)
                    else:
                        self._settle(chunk, answered=True)
                        yield Part(chunk.start, answers.items, answers.version, answers.num_tokens)
        finally:
            await _end(running)

    def _take(self, queue: deque[Chunk]) -> Chunk:
        """Take the next chunk: as much as suits the replicas, or all of what has to be asked again."""
        if queue[0].num_deaths:
            return queue.popleft()
        num_left = sum(self._tokens(each) for each in queue)
        wanted = self._window.pace.chunk_tokens(num_left, self._window.num_replicas)
        most = min(self._limits.chunk_tokens, wanted)
        chunk, rest = split_off(queue.popleft(), self._tokens_before, most, self._limits.chunk_items)
        if rest is not None:
            queue.appendleft(rest)
        return chunk

    def _may_start(self, chunk: Chunk, running: Collection[Chunk], may_run_ahead: Callable[[], bool]) -> bool:
        if not running:
            return True
        if chunk.is_suspect or any(each.is_suspect for each in running):
            return False
        return len(running) < self._window.capacity and may_run_ahead()

    async def _run(self, chunk: Chunk, waiting_tokens: int) -> Answers:
        loop = asyncio.get_running_loop()
        refused_at: float | None = None
        while True:
            async with self._window.place():
                try:
                    async with asyncio.timeout(self._limits.call_timeout_s):
                        answers = await self._ask(self._items[chunk.start : chunk.stop], waiting_tokens)
                    assert len(answers.items) == chunk.stop - chunk.start, "an answer to each item"
                    return answers
                except TimeoutError:
                    raise ReplicaDiedError(f"no answer within {self._limits.call_timeout_s:g} s") from None
                except WireError as error:
                    refused_at = refused_at or loop.time()
                    if error.status not in NOT_NOW or loop.time() - refused_at > self._limits.patience_s:
                        raise
                    pause_s = min(error.retry_after_s or 1.0, MAX_PAUSE_S)
            await asyncio.sleep(pause_s)

    def _tokens(self, chunk: Chunk) -> int:
        return self._tokens_before[chunk.stop] - self._tokens_before[chunk.start]

    def _settle(self, chunk: Chunk, *, answered: bool) -> None:
        num_tokens = min(self._tokens(chunk), self._num_unsettled)  # a part that is asked again counts once
        self._num_unsettled -= num_tokens
        self._window.settle(num_tokens, answered=answered)


def _failure(error: ReplicaDiedError) -> ItemFailure:
    return ItemFailure(
        "model_failed",
        f"replicas ended while they answered this item: {error}",
        "leave it out; see the server's log",
    )


async def _end(running: Mapping[asyncio.Task[Answers], Chunk]) -> None:
    """Cancel what is in flight and wait until it is gone."""
    for task in running:
        task.cancel()
    if running:
        await asyncio.wait(running)
    for task in running:
        if not task.cancelled():
            task.exception()  # retrieved: it is nobody's any more
