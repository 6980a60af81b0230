"""The one thread in which a model runs, so that the event loop stays free."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")


class ModelThread(Generic[T, R]):
    """Runs a function of a batch in one thread of its own; what a `Batcher` calls.

    Args:
        function: Answers a batch under its options, for example `Engine.run`.
    """

    def __init__(self, function: Callable[[Sequence[T], Any], Sequence[R]]) -> None:
        self._function = function
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eagleray-model")

    async def __call__(self, items: Sequence[T], options: Any) -> Sequence[R]:
        """Answer a batch."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._executor, self._run, items, options)

    def close(self) -> None:
        """Let the running batch end and stop the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    def _run(self, items: Sequence[T], options: Any) -> Sequence[R]:
        try:
            return self._function(items, options)
        except (SystemExit, KeyboardInterrupt) as error:
            # The user's code called exit(): that must not end the event loop, which would lose every request.
            raise RuntimeError(f"the model raised {type(error).__name__}") from error
