"""An engine behind admission and a batcher."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from eagleray.config.schema import ServeConfig
from eagleray.engine import Batcher, Engine, ItemError, Lane, ModelThread, Prepared
from eagleray.errors import ModelStoppedError
from eagleray_serving.admission import DrainRate, overloaded
from eagleray_serving.answering import Answered, Answers, Asking, ItemFailure
from eagleray_serving.chunks import estimate_tokens
from eagleray_serving.schema import WireError

logger = logging.getLogger(__name__)

LANES = {"interactive": Lane.INTERACTIVE, "bulk": Lane.BULK}
# A way into another thread and back costs more than encoding a word: a small item is encoded where it arrives, as
# long as items have been quicker than this, in seconds.
QUICK_S = 0.0003
QUICK_TOKENS = 64
# Of the time limit of a request. After one, whoever waited for a batch is gone, and what decodes step by step has
# been told to let go; a batch that runs as a whole has as long again to come to its end.
STUCK_AFTER = 2


class BatchedEngine:
    """An engine behind admission and a batcher, as a service wants it.

    Args:
        engine: The loaded model.
        serve: The file's `serve` section.
        on_step: Told the items and the tokens that are in work, whenever the model is put to it.
        clock: Seconds, for how long encoding takes.
    """

    def __init__(
        self,
        engine: Engine,
        serve: ServeConfig,
        on_step: Callable[[int, int], None] = lambda num_items, num_tokens: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._engine = engine
        self._max_queued_tokens = serve.max_queued_tokens
        self._defaults = {"num_beams": serve.num_beams} if engine.summary.route == "translate" else {}
        # Two threads, one each: a tokenizer and a model may run side by side, but neither beside itself.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eagleray-prepare")
        self._running = ModelThread()
        self._batcher = Batcher[Prepared, Any](self._running.start(engine), engine.limits, on_step=on_step)
        self._num_preparing = 0
        self._clock = clock
        self._encoding = threading.Lock()
        self._encoding_since: float | None = None
        self._is_closing = False
        self._stuck_after_s = STUCK_AFTER * serve.request_timeout_s
        self._prepare_s = 1.0  # seconds per item, lately; not known to be quick at first
        self._rate = DrainRate()

    @property
    def version(self) -> str:
        """`r1-step-00001200`."""
        return self._engine.summary.version

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait and are not yet in work."""
        return self._batcher.num_queued_tokens

    @property
    def num_tokens(self) -> int:
        """Tokens that wait or are in work; an item that is not yet encoded counts as one."""
        return self._batcher.num_queued_tokens + self._batcher.num_running_tokens + self._num_preparing

    @property
    def trouble(self) -> str | None:
        """Why nobody here can expect an answer; None while all is well. What a health check looks at."""
        if not self._running.is_alive and not self._is_closing:
            return "the model's thread has ended"
        since, limit_s = self._encoding_since, self._stuck_after_s
        if since is not None and self._clock() - since > limit_s:
            return f"an item has been encoded for {self._clock() - since:.0f} s; the limit is {limit_s:g} s"
        return self._batcher.trouble(limit_s)

    async def close(self) -> None:
        """Answer what runs, refuse what waits, end the threads and free the weights."""
        self._is_closing = True
        await self._batcher.close()
        await asyncio.to_thread(self._end)

    def _end(self) -> None:
        self._preparing.shutdown(wait=True, cancel_futures=True)
        self._running.close()
        self._engine.close()

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        """Answer each item for itself, in order.

        Raises:
            WireError: 429, too much is waiting; 503, the replica is being stopped.
        """
        prepared, num_tokens = await self._admitted(items)
        options = {**self._defaults, **options}
        lane = LANES[asking.lane]
        if len(prepared) == 1:
            answers = [await self._run(prepared[0], options, lane)]
        else:
            answers = await asyncio.gather(*(self._run(item, options, lane) for item in prepared))
        return Answers(self._engine.summary.version, answers, num_tokens)

    async def stream(
        self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking
    ) -> AsyncGenerator[Answers, None]:
        """Yield the answer to one item as it grows, at last all of it; beams and other engines give it at once.

        Raises:
            WireError: 429, too much is waiting; 503, the replica is being stopped.
        """
        (prepared,), num_tokens = await self._admitted([item])
        loop, version = asyncio.get_running_loop(), self._engine.summary.version
        grown: asyncio.Queue[Answered | None] = asyncio.Queue()

        def tell(answer: Any) -> None:  # in the model's thread
            if not isinstance(answer, ItemError):
                loop.call_soon_threadsafe(grown.put_nowait, answer)

        growing = self._engine.growing({**self._defaults, **options})
        running = self._run(prepared, growing, LANES[asking.lane], tell)
        task = loop.create_task(running)
        task.add_done_callback(lambda _: grown.put_nowait(None))
        try:
            while (answer := await grown.get()) is not None:
                yield Answers(version, [answer], num_tokens, is_whole=False)
            yield Answers(version, [task.result()], num_tokens)
        finally:
            task.cancel()  # nobody reads on: its row leaves the batch

    async def _admitted(self, items: Sequence[Mapping[str, Any]]) -> tuple[list[Prepared | ItemError], int]:
        """Prepare items that there is room for; return them and their tokens."""
        # Every item has a token at least; how many more is known once it is prepared.
        self._admit(len(items))
        prepared = await self._prepare(items)
        num_tokens = sum(item.num_tokens for item in prepared if isinstance(item, Prepared))
        self._admit(num_tokens)
        return prepared, num_tokens

    def _admit(self, num_tokens: int) -> None:
        waiting = self._batcher.num_queued_tokens + self._num_preparing
        # A request that is larger than the budget alone is admitted when nothing waits: else it never would be.
        if waiting and waiting + num_tokens > self._max_queued_tokens:
            raise overloaded(
                f"{waiting} tokens are waiting; the limit is {self._max_queued_tokens}",
                self._rate.seconds_for(waiting + num_tokens - self._max_queued_tokens),
            )

    async def _prepare(self, items: Sequence[Mapping[str, Any]]) -> list[Prepared | ItemError]:
        if self._is_quick(items):
            return self._prepare_now(items)
        self._num_preparing += len(items)
        given_up = threading.Event()
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._preparing, self._prepare_now, items, given_up
            )
        finally:
            given_up.set()  # where nobody waits any more, the rest is not for the thread to do
            self._num_preparing -= len(items)

    def _is_quick(self, items: Sequence[Mapping[str, Any]]) -> bool:
        # Nothing else may be preparing, also for somebody who gave up: a tokenizer does not run beside itself.
        if self._num_preparing or self._encoding.locked() or len(items) > 1 or self._prepare_s > QUICK_S:
            return False
        return estimate_tokens(items[0]) <= QUICK_TOKENS

    def _prepare_now(
        self, items: Sequence[Mapping[str, Any]], given_up: threading.Event | None = None
    ) -> list[Prepared | ItemError]:
        with self._encoding:
            begin = self._clock()
            prepared = [self._prepare_one(item) for item in items if given_up is None or not given_up.is_set()]
            taken_s = (self._clock() - begin) / max(1, len(prepared))
            self._prepare_s = max(taken_s, (self._prepare_s + taken_s) / 2)  # one slow item is believed at once
        return prepared

    def _prepare_one(self, item: Mapping[str, Any]) -> Prepared | ItemError:
        self._encoding_since = self._clock()
        try:
            return _prepare(self._engine, item)
        finally:
            self._encoding_since = None

    async def _run(
        self,
        item: Prepared | ItemError,
        options: Mapping[str, Any],
        lane: Lane,
        on_partial: Callable[[Any], None] | None = None,
    ) -> Answered:
        answer: Any = item
        if isinstance(item, Prepared):
            try:
                answer = await self._batcher.submit(
                    item, num_tokens=item.num_tokens, options=options, lane=lane, on_partial=on_partial
                )
            except ModelStoppedError as error:
                raise WireError(503, "unavailable", error.message, error.hint, retry_after_s=1) from None
            self._rate.add(item.num_tokens)
        if isinstance(answer, ItemError):
            return ItemFailure(answer.code, answer.message, answer.hint)
        return answer  # type: ignore[no-any-return]


def _prepare(engine: Engine, item: Mapping[str, Any]) -> Prepared | ItemError:
    try:
        return engine.prepare(item)
    except Exception as error:
        # Our own tasks raise DataError; a user's raises what it likes when an item is not what it expects.
        logger.warning("%s cannot encode an item", engine.summary.ref, exc_info=True)
        reason = f"the task cannot use this item ({type(error).__name__})"
        return ItemError("invalid_item", reason, "look at its input columns")
