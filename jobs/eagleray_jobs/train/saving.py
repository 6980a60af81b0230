"""Checkpoints from the loop's side: started in the background, settled by all ranks together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from torch import Tensor

from eagleray.store.saver import SaveResult
from eagleray_jobs.train.spec import Control

logger = logging.getLogger(__name__)


class Saver(Protocol):
    """What the loop needs of the store: `CheckpointSaver`, or a fake.

    Four methods, because a save has two moments that the loop must tell apart. `save` ends when the tensors
    are copied and the steps may change them; the commit comes later, and is learned by asking (`poll`)
    between steps or by waiting (`wait`) when there is no next step. `close` gives threads and groups back.
    """

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        before_commit: Callable[[], None] | None = None,
        copy: bool = True,
    ) -> None:
        """Copy the tensors, unless they stay as they are, and begin to write; waits for the save in flight.

        Collective.

        Raises:
            FencedError: The run was taken over.
            StoreError: Three saves failed in a row.
        """
        ...

    def poll(self) -> list[SaveResult]:
        """Return what was committed or failed since the last call."""
        ...

    def wait(self) -> list[SaveResult]:
        """Like `poll`, after the save in flight has ended. Collective; raises what `save` raises."""
        ...

    def close(self) -> None:
        """Give threads and process groups back."""
        ...


class Saves:
    """Follows the saves of a run.

    Each rank learns of a commit at a time of its own. Nothing is done about it until all of them know, which
    they find out in the exchange of a step: then every rank acts between the same two steps.

    Args:
        saver: Writes.
        control: Learns of every result.
        last_ref: The version that the run goes on from.
        prune: Applies `train.save_total_limit`, on rank 0 in a thread; None elsewhere.
        meet: Waits for all ranks, with the timeout of a step. A save is waited for as long as a store may take:
            who does not even come to wait is missed before.
    """

    def __init__(
        self,
        saver: Saver,
        control: Control,
        last_ref: str | None,
        prune: Callable[[], object] | None,
        meet: Callable[[], object],
    ) -> None:
        self._saver = saver
        self._control = control
        self._prune = prune
        self._meet = meet
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="retention")
        self._num_started = 0
        self._num_finished = 0
        self._results: list[SaveResult] = []
        self.last_ref = last_ref

    def in_flight(self) -> bool:
        """Say whether this rank still writes."""
        if self._num_finished < self._num_started:
            self._collect(self._saver.poll())
        return self._num_finished < self._num_started

    def start(
        self,
        *,
        step: int,
        tensors: Mapping[str, Tensor],
        files: Mapping[str, bytes],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        before_commit: Callable[[], None] | None = None,
        copy: bool = True,
    ) -> None:
        """Begin a save; one that is in flight is waited for and settled first.

        `copy=False`: nothing changes the tensors any more, and they are written without a copy.
        """
        self.finish()
        self._saver.save(
            step=step,
            tensors=tensors,
            files=files,
            state=state,
            metrics=metrics,
            before_commit=before_commit,
            copy=copy,
        )
        self._num_started += 1

    def settle(self, *, any_in_flight: bool) -> None:
        """Act on the results that every rank has; called by all ranks together."""
        if any_in_flight:
            return
        results, self._results = self._results, []
        for result in results:
            self._act_on(result)

    def finish(self) -> None:
        """Wait for the last save and act on it."""
        if self._num_started:
            self._meet()
        self._collect(self._saver.wait())
        self.settle(any_in_flight=False)

    def close(self) -> None:
        """End the threads; retention that is in work is finished."""
        self._saver.close()
        self._pool.shutdown()

    def _collect(self, results: list[SaveResult]) -> None:
        self._results += results
        self._num_finished += len(results)

    def _act_on(self, result: SaveResult) -> None:
        self._control.saved(result)
        if result.ref is None:
            logger.warning("the save of step %d failed: %s", result.step, result.error)
            return
        self.last_ref = result.ref
        if self._prune is not None:
            self._pool.submit(self._prune_safely, self._prune)

    @staticmethod
    def _prune_safely(prune: Callable[[], object]) -> None:
        try:
            prune()
        except Exception as error:
            logger.warning("old checkpoints were not removed: %s: %s", type(error).__name__, error)
