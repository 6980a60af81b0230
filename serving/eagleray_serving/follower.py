"""A replica's part in a rollout: it loads what the controller names, tries it, and reports how far it is.

Loading and the board's requests run in threads; the event loop, and with it every request and the health check,
goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eagleray.errors import CheckpointDamagedError, NotFoundError, StoreError
from eagleray_serving.board import Board
from eagleray_serving.rollout import Candidate, Report, Rollout, Stage
from eagleray_serving.room import NoRoomError
from eagleray_serving.split import Split
from eagleray_serving.trial import Recorded, Recorder
from eagleray_serving.versions import Loaded, Versions

logger = logging.getLogger(__name__)

STEP_S = 1.0
# Seconds after which a version that must be there, and could not be loaded, is tried again.
RETRY_S = 5.0
MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True, slots=True)
class Loading:
    """How a replica gets at versions; both open, verify and load one, and may block.

    With examples, it is tried on them and compared with what is served.

    Attributes:
        beside: Beside the current version; raises `NoRoomError` where both do not fit.
        alone: Where no other is.
    """

    beside: Callable[[str, Sequence[Recorded] | None], Loaded]
    alone: Callable[[str, Sequence[Recorded] | None], Loaded]


class Follower:
    """Makes the versions of a replica follow the controller.

    Args:
        replica: Its id.
        versions: What it holds.
        recorder: What a new version is tried on.
        board: Where the controller says what follows.
        loading: How to get at versions.
    """

    def __init__(
        self, replica: str, versions: Versions, recorder: Recorder, board: Board, loading: Loading
    ) -> None:
        self._replica = replica
        self._versions = versions
        self._recorder = recorder
        self._board = board
        self._loading = loading
        self._beat = 0
        self._window: int | None = None
        self._trial = 0
        self._stage: Stage = "loading"
        self._reason = ""
        self._retry_at = 0.0
        self._work: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Follow for good."""
        failing = False
        while True:
            try:
                await self.step()
                failing = False
            except Exception:
                # The board is Ray's: while it does not answer, what is served stays as it is.
                if not failing:
                    logger.warning("replica %s cannot follow its controller", self._replica, exc_info=True)
                failing = True
            await asyncio.sleep(STEP_S)

    async def step(self) -> None:
        """Take up what the controller says, and report."""
        state = await asyncio.to_thread(self._board.rollout)
        if state is not None:
            self._count_anew(state)
            if self._work is None or self._work.done():
                self._work = asyncio.create_task(self._converge(state))
            # What needs no loading is done at once, and reported with this step.
            await asyncio.wait([self._work], timeout=0.05)
        await asyncio.to_thread(self._board.report, self.report())

    def report(self) -> Report:
        """Return what this replica says of itself."""
        self._beat += 1
        split = self._versions.split
        return Report(
            replica=self._replica,
            beat=self._beat,
            loaded=self._versions.loaded,
            answering=None if split is None else split.current,
            trial=self._trial,
            stage=self._stage,
            reason=self._reason,
            window=self._window or 0,
            figures=self._versions.figures(),
            canary=None if split is None else split.canary,
        )

    def _count_anew(self, state: Rollout) -> None:
        if state.window != self._window:
            if self._window is not None:
                self._versions.reset_figures()
            self._window = state.window

    async def _converge(self, state: Rollout) -> None:
        """Hold what is wanted and nothing else."""
        try:
            self._route(state)
            await self._retire_unwanted(state)
            candidate = state.candidate
            if not self._answers_for(state) and time.monotonic() >= self._retry_at:
                await self._take_current(state)
            if candidate is not None and (candidate.trial != self._trial or self._stage in ("loading", "no_room")):
                await self._try(candidate)
        except Exception as error:
            self._retry_at = time.monotonic() + RETRY_S
            logger.warning("replica %s: %s; it tries again", self._replica, error)

    def _route(self, state: Rollout) -> None:
        loaded, candidate = self._versions.loaded, state.candidate
        if state.current not in loaded:
            return
        canary, percent = None, 0.0
        if candidate is not None and candidate.is_tried and candidate.version in loaded:
            canary, percent = candidate.version, candidate.percent
        self._versions.route(Split(state.current, canary, percent))

    def _answers_for(self, state: Rollout) -> bool:
        """Whether the current version is here, or the candidate stands in for it already."""
        loaded, candidate = self._versions.loaded, state.candidate
        return state.current in loaded or (candidate is not None and candidate.version in loaded)

    async def _retire_unwanted(self, state: Rollout) -> None:
        wanted = {state.current, state.candidate.version if state.candidate else None}
        split = self._versions.split
        if split is not None:
            wanted |= {split.current, split.canary}
        for version in self._versions.loaded:
            if version not in wanted:
                await self._versions.retire(version)

    async def _take_current(self, state: Rollout) -> None:
        """Load the version that every replica should have by now."""
        try:
            self._versions.add(await asyncio.to_thread(self._loading.beside, state.current, None))
        except NoRoomError:
            await self._replace(state.current, None)
        self._route(state)
        await self._retire_unwanted(state)

    async def _try(self, candidate: Candidate) -> None:
        if candidate.trial != self._trial:
            self._trial, self._stage, self._reason = candidate.trial, "loading", ""
        if candidate.version in self._versions.loaded:
            self._stage = "ready"
            return
        examples = self._recorder.examples()
        try:
            if candidate.turn == self._replica:
                self._stage = "loading"
                await self._replace(candidate.version, examples)
            else:
                self._versions.add(await asyncio.to_thread(self._loading.beside, candidate.version, examples))
        except NoRoomError as error:
            self._stage, self._reason = "no_room", str(error)
            return
        except Exception as error:
            if _may_pass(error):
                raise
            self._stage, self._reason = "refused", str(error)[:MAX_REASON_CHARACTERS]
            logger.warning("replica %s refuses %s: %s", self._replica, candidate.version, error)
            return
        self._stage = "ready"

    async def _replace(self, version: str, examples: Sequence[Recorded] | None) -> None:
        """Unload what is here, then load a version; when that fails, what was here. Requests wait meanwhile."""
        split = self._versions.split
        self._versions.hold()
        before = split.current if split is not None else None
        for each in self._versions.loaded:
            await self._versions.retire(each)
        try:
            loaded = await asyncio.to_thread(self._loading.alone, version, examples)
        except Exception:
            if before is not None:
                self._versions.add(await asyncio.to_thread(self._loading.alone, before, None))
                self._versions.route(Split(before))
            raise
        self._versions.add(loaded)
        self._versions.route(Split(version))


def _may_pass(error: Exception) -> bool:
    """Whether the store did not answer, which says nothing about the version."""
    return isinstance(error, StoreError) and not isinstance(error, NotFoundError | CheckpointDamagedError)
