"""Several versions of a model in one replica, of which one answers each request, by a split that can change.

All of it happens on the event loop of the replica, between two steps of it: a request is admitted by exactly one
version and ends there, however the split changes meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

from eagleray_serving.answering import Answers, Asking, ItemFailure
from eagleray_serving.figures import Figures
from eagleray_serving.schema import WireError
from eagleray_serving.split import Split
from eagleray_serving.trial import Recorder

logger = logging.getLogger(__name__)

# Failures of an item that are the model's fault, not the item's.
MODEL_FAULTS = ("model_failed",)


class Loaded(Protocol):
    """A version in memory, behind its batcher."""

    @property
    def version(self) -> str:
        """`r1-step-00001200`."""

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait and are not yet in work."""

    @property
    def num_tokens(self) -> int:
        """Tokens that wait or are in work."""

    @property
    def trouble(self) -> str | None:
        """Why nobody can expect an answer from it; None while all is well."""

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        """Answer each item for itself, in order."""

    def stream(
        self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking
    ) -> AsyncGenerator[Answers, None]:
        """Yield the answer to one item as it grows."""

    async def close(self) -> None:
        """End its threads and processes; nothing is in work any more."""


@dataclass(slots=True, eq=False)
class _Held:
    """A loaded version and what is in work on it."""

    loaded: Loaded
    figures: Figures = field(default_factory=Figures)
    num_active: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)


class Versions:
    """The versions of a model that a replica holds; an `Answerer`.

    Args:
        first: The version that answers at first.
        timeout_s: Time limit of a request: one that is given up after it counts as an error.
        recorder: Keeps a handful of what the current version answers.
    """

    def __init__(self, first: Loaded, timeout_s: float = 60.0, recorder: Recorder | None = None) -> None:
        self._held = {first.version: _Held(first)}
        self._retiring: set[_Held] = set()
        self._split: Split | None = Split(first.version)
        self._timeout_s = timeout_s
        self._recorder = recorder
        self._open = asyncio.Event()
        self._open.set()

    @property
    def loaded(self) -> tuple[str, ...]:
        """The versions in memory that requests may meet."""
        return tuple(self._held)

    @property
    def num_queued_tokens(self) -> int:
        """Tokens that wait, whichever version they wait for."""
        return sum(held.loaded.num_queued_tokens for held in self._held.values())

    @property
    def num_tokens(self) -> int:
        """Tokens that wait or are in work, over all versions."""
        return sum(held.loaded.num_tokens for held in self._held.values())

    @property
    def trouble(self) -> str | None:
        """Why a version that is held, or is on its way out, answers nobody any more; None while all is well."""
        for held in (*self._held.values(), *self._retiring):
            if (trouble := held.loaded.trouble) is not None:
                return f"{held.loaded.version}: {trouble}"
        return None

    @property
    def split(self) -> Split | None:
        """How requests are divided; None while they wait for a version."""
        return self._split

    def get(self, version: str) -> Loaded:
        """Return a version that is loaded."""
        return self._held[version].loaded

    def figures(self) -> dict[str, Figures]:
        """Return the figures of each version since they were last reset."""
        return {version: held.figures for version, held in self._held.items()}

    def reset_figures(self) -> None:
        """Begin to count anew."""
        for held in self._held.values():
            held.figures = Figures()

    def add(self, loaded: Loaded) -> None:
        """Hold one more version; no request meets it until `route` names it."""
        assert loaded.version not in self._held, f"{loaded.version} is held already"
        self._held[loaded.version] = _Held(loaded)

    def route(self, split: Split) -> None:
        """Divide the requests that are admitted from now on; those in work end where they are."""
        for version in filter(None, (split.current, split.canary)):
            assert version in self._held, f"{version} is not loaded"
        self._split = split
        self._open.set()

    def hold(self) -> None:
        """Let requests wait until `route` is called: between two versions that do not fit beside each other."""
        self._split = None
        self._open.clear()

    async def retire(self, version: str) -> None:
        """Wait until a version's last request is answered, then end it and free its memory."""
        assert self._split is None or version not in (self._split.current, self._split.canary)
        held = self._held.pop(version)
        self._retiring.add(held)
        while held.num_active:
            held.idle.clear()
            await held.idle.wait()
        await held.loaded.close()
        self._retiring.remove(held)
        del held
        # A module and what generates for it refer to each other: only the collector sees that both are gone.
        await asyncio.to_thread(gc.collect)
        logger.info("version %s is unloaded", version)

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        """Answer by the version that the split chooses; what a canary fails is answered by the current one.

        Raises:
            WireError: 429, too much is waiting; 503, the replica is being stopped.
        """
        split = await self._current_split()
        chosen = split.choose(asking.request_id)
        if chosen == split.current:
            answers = await self._ask(chosen, items, options, asking)
            if self._recorder is not None:
                self._recorder.record(items, options, answers)
            return answers
        with self._kept(split.current) as current:
            try:
                answers = await self._ask(chosen, items, options, asking)
                if not _is_fault(answers):
                    return answers
                reason = "failed on an item"
            except WireError as error:
                if error.status < 500:
                    raise
                reason = error.message
            except Exception as error:
                reason = f"{type(error).__name__}: {error}"
            logger.warning("canary %s: %s; %s answers instead", chosen, reason, split.current)
            return await self._count(current, items, options, asking)

    async def stream(
        self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking
    ) -> AsyncGenerator[Answers, None]:
        """Yield the answer to one item as it grows, by the version that the split chooses and by it alone.

        Raises:
            WireError: 429, too much is waiting; 503, the replica is being stopped.
        """
        split = await self._current_split()
        begin, answers = time.monotonic(), None
        with self._kept(split.choose(asking.request_id)) as held:
            try:
                async with aclosing(held.loaded.stream(item, options, asking)) as grown:
                    async for answers in grown:
                        yield answers
            except (GeneratorExit, asyncio.CancelledError):
                raise  # the client went away
            except Exception as error:
                if not isinstance(error, WireError) or error.status >= 500:
                    held.figures.add(time.monotonic() - begin, is_error=True)
                raise
            assert answers is not None, "a stream has an end"
            held.figures.add(time.monotonic() - begin, is_error=_is_fault(answers))

    async def _current_split(self) -> Split:
        while self._split is None:
            await self._open.wait()
        return self._split

    async def _ask(
        self, version: str, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        with self._kept(version) as held:
            return await self._count(held, items, options, asking)

    async def _count(
        self, held: _Held, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        begin = time.monotonic()
        try:
            answers = await held.loaded.answer(items, options, asking)
        except asyncio.CancelledError:
            # The client went away, or the time of the request was over, which says something about the version.
            if time.monotonic() - begin >= self._timeout_s * 0.95:
                held.figures.add(time.monotonic() - begin, is_error=True)
            raise
        except WireError as error:
            if error.status >= 500:
                held.figures.add(time.monotonic() - begin, is_error=True)
            raise
        except Exception:
            held.figures.add(time.monotonic() - begin, is_error=True)
            raise
        held.figures.add(time.monotonic() - begin, is_error=_is_fault(answers))
        return answers

    @contextmanager
    def _kept(self, version: str) -> Iterator[_Held]:
        """Keep a version from being retired; entered in the same step of the loop in which it was chosen."""
        held = self._held[version]
        held.num_active += 1
        try:
            yield held
        finally:
            held.num_active -= 1
            held.idle.set()


def _is_fault(answers: Answers) -> bool:
    return any(isinstance(item, ItemFailure) and item.code in MODEL_FAULTS for item in answers.items)
