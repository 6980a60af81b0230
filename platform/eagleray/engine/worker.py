"""The one thread in which a model runs, so that the event loop stays free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from eagleray.engine.work import BatchWork, Ended, Entering, Work

T = TypeVar("T")
R = TypeVar("R")
V = TypeVar("V")


class Stepper(Protocol[T, R]):
    """Decodes items step by step, in one thread."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in work."""
        ...

    def add(self, entering: Entering[T]) -> None:
        """Let an item in."""
        ...

    def drop(self, keys: Collection[int]) -> None:
        """Let go of items in work."""
        ...

    def step(self) -> Sequence[Ended[R]]:
        """Take one step; return the items that ended."""
        ...


class StepwiseModel(Protocol[T, R]):
    """A model that answers batches, and may decode step by step."""

    def run(self, items: Sequence[T], options: Mapping[str, Any]) -> Sequence[R]:
        """Answer a batch."""
        ...

    def stepper(self, options: Mapping[str, Any]) -> Stepper[T, R] | None:
        """Return what decodes step by step under some options; None: this model answers whole batches."""
        ...


class ModelThread:
    """Runs everything of a model in one thread of its own."""

    def __init__(self) -> None:
        # The thread must not know this object: an executor that nobody holds any more ends its thread.
        begun: list[threading.Thread] = []
        self._begun = begun
        self._executor = ThreadPoolExecutor(
            max_workers=1,
            thread_name_prefix="eagleray-model",
            initializer=lambda: begun.append(threading.current_thread()),
        )

    @property
    def is_alive(self) -> bool:
        """Whether a call would be run; the thread begins with the first one."""
        return all(thread.is_alive() for thread in self._begun)

    async def call(self, function: Callable[..., V], *arguments: Any) -> V:
        """Call a function in the thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, _call, function, arguments)

    def start(self, model: StepwiseModel[T, R]) -> Callable[[Mapping[str, Any]], Work[T, R]]:
        """Return how a model is put to work in this thread: what a `Batcher` takes."""

        def start(options: Mapping[str, Any]) -> Work[T, R]:
            stepper = model.stepper(options)
            if stepper is not None:
                return StepWork(self, stepper)
            return BatchWork(lambda items, options: self.call(model.run, items, options), options)

        return start

    def close(self) -> None:
        """Let the running call end and stop the thread."""
        self._executor.shutdown(wait=True, cancel_futures=True)


class StepWork(Generic[T, R]):
    """A model that decodes step by step: items enter and leave between its steps.

    Args:
        thread: Where it runs.
        stepper: What decodes.
    """

    takes_more = True

    def __init__(self, thread: ModelThread, stepper: Stepper[T, R]) -> None:
        self._thread, self._stepper = thread, stepper
        self._hurried = threading.Event()

    async def advance(self, entering: Sequence[Entering[T]], leaving: Collection[int]) -> Sequence[Ended[R]]:
        """Let items in, and take steps until one ends or somebody is in a hurry."""
        self._hurried.clear()
        return await self._thread.call(self._advance, entering, leaving)

    def hurry(self) -> None:
        """Let the running `advance` end with its present step."""
        self._hurried.set()

    def _advance(self, entering: Sequence[Entering[T]], leaving: Collection[int]) -> Sequence[Ended[R]]:
        self._stepper.drop(leaving)
        for each in entering:
            self._stepper.add(each)
        ended: Sequence[Ended[R]] = ()
        while not ended and not self._stepper.is_idle:
            ended = self._stepper.step()
            if self._hurried.is_set():
                break
        return ended


def _call(function: Callable[..., V], arguments: Sequence[Any]) -> V:
    try:
        return function(*arguments)
    except (SystemExit, KeyboardInterrupt) as error:
        # The user's code called exit(): that must not end the event loop, which would lose every request.
        raise RuntimeError(f"the model raised {type(error).__name__}") from error
