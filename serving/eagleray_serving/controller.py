"""Decides which versions of a model are served, by what is in the store and what the replicas report.

One process of a server holds it. What it knows that must not be lost is on the board.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from eagleray.errors import EaglerayError, NotFoundError, StoreError, UsageError
from eagleray.store.aliases import validate_alias
from eagleray.store.leases import RENEW_S, write_lease
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry, describe
from eagleray_serving import rollout
from eagleray_serving.board import Board
from eagleray_serving.plan import ModelPlan
from eagleray_serving.rollout import Report, Rollout
from eagleray_serving.views import view
from eagleray_serving.watch import Watch

logger = logging.getLogger(__name__)

# Seconds without a report after which a replica counts as gone.
SILENCE_S = 15.0


class Controller:
    """The versions of one model. Every method may block, and may be called from any thread.

    Args:
        plan: The model, and the version that it starts with.
        board: Where the replicas report.
        clock: Seconds since the epoch.
        monotonic: Seconds of a clock that is never set.
    """

    def __init__(
        self,
        plan: ModelPlan,
        board: Board,
        *,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._plan = plan
        self._name = plan.card.name
        self._policy = plan.serve.rollout
        self._follow = plan.serve.follow
        self._board = board
        self._clock = clock
        self._monotonic = monotonic
        self._lock = threading.Lock()
        self._store = ObjectStore.open(plan.store)
        self._watch = Watch(self._store, plan.card.name, self._follow) if self._follow else None
        self._state: Rollout | None = None
        self._heard: dict[str, tuple[int, float]] = {}
        self._reports: list[Report] = []
        self._looked_at = self._leased_at = -float("inf")
        self._complaint: str | None = None
        self._scores: dict[str, Mapping[str, float]] = {plan.card.version: plan.card.scores}

    def step(self) -> None:
        """Look, decide, and say what follows."""
        with self._lock:
            state = self._known()
            self._reports = self._living(self._board.reports())
            state = self._look(state)
            self._say(rollout.decide(state, self._reports, self._policy, self._clock()))
            self._renew_lease(changed=False)

    def canary(self, ref: str, percent: float) -> str:
        """Begin a canary, or change its share; returns its version.

        Raises:
            UsageError: It is no reference of this model, or another version is on its way.
            NotFoundError: It stands for nothing.
            CheckpointDamagedError: Its manifest was changed.
        """
        with self._lock:
            state = self._known()
            version = Registry(self._store).manifest(self._reference(ref)).version
            self._say(rollout.canary(state, version, percent, self._clock()))
            return version

    def promote(self) -> str:
        """Let the canary take over; returns its version. A followed alias is set to it.

        Raises:
            UsageError: There is no canary, or it is still being loaded.
        """
        with self._lock:
            self._say(rollout.promote(self._known(), self._clock()))
            self._set_alias("promoted by eagleray serve promote")
            return self._known().current

    def roll_back(self) -> str:
        """End the canary, or go back to the version before; returns the version that answers then.

        Raises:
            UsageError: There is nothing to go back to.
        """
        with self._lock:
            state = rollout.roll_back(self._known(), self._clock())
            self._say(state)
            return state.candidate.version if state.candidate is not None else state.current

    def view(self) -> dict[str, Any]:
        """Return what `/v1/models` shows."""
        # Without the lock: a store that does not answer must not keep anybody from looking.
        return view(self._known(), self._reports, self._follow, self._complaint)

    def scores(self) -> Mapping[str, float]:
        """Return what the current version scored; nothing where the store does not say."""
        with self._lock:
            version = self._known().current
        if version not in self._scores:
            try:
                manifest = Registry(self._store).open(self._reference(version)).manifest
            except EaglerayError:
                return {}
            self._scores[version] = {name: score for name, score in manifest.metrics.items() if score is not None}
        return self._scores[version]

    def _known(self) -> Rollout:
        if self._state is None:
            version = self._plan.card.version
            fresh = Rollout(version, followed=version if self._follow else None, since=self._clock())
            self._state = self._board.rollout() or fresh
        return self._state

    def _say(self, state: Rollout) -> None:
        before = self._known()
        if state == before:
            return
        # The board first: what was not written down was not decided.
        self._board.tell(state)
        self._state = state
        for event in state.events:
            if event not in before.events:
                log = logger.warning if event.what == "refused" else logger.info
                log("%s@%s is %s: %s", self._name, event.version, event.what, event.reason)
        was_rolled_back = before.candidate is not None and before.candidate.purpose == "rollback"
        if was_rolled_back and state.current != before.current:
            self._set_alias("rolled back by its server")
        self._renew_lease(changed=True)

    def _living(self, reports: Sequence[Report]) -> list[Report]:
        now = self._monotonic()
        living = []
        for report in reports:
            beat, heard_at = self._heard.get(report.replica, (-1, now))
            if report.beat != beat:
                heard_at = now
            self._heard[report.replica] = (report.beat, heard_at)
            if now - heard_at <= SILENCE_S:
                living.append(report)
            else:
                del self._heard[report.replica]
                self._board.forget(report.replica)
        return living

    def _look(self, state: Rollout) -> Rollout:
        """Take up what the followed reference stands for, once nothing else is on its way."""
        due = self._monotonic() - self._looked_at >= self._plan.serve.follow_interval_s
        if self._watch is None or state.candidate is not None or not due:
            return state
        self._looked_at = self._monotonic()
        try:
            version = self._watch.look()
            if version == state.followed:
                self._complain(None)
                return state
            state = self._offer(replace(state, followed=version), version)
        except EaglerayError as error:
            # Whatever it is, the current version goes on, and the next look may see more.
            self._complain(error.message)
            return state
        self._complain(None)
        return state

    def _offer(self, state: Rollout, version: str) -> Rollout:
        now = self._clock()
        if version == state.current:
            return state
        registry = Registry(self._store)
        try:
            found = describe(registry.manifest(self._reference(version)))
        except StoreError as error:
            if type(error) is StoreError:
                raise  # the store does not answer: look again
            return rollout.refuse(state, error.message, now, version)
        try:
            current = describe(registry.manifest(self._reference(state.current)))
        except NotFoundError:
            current = None  # deleted while it is served: there is nothing to compare with
        reason = rollout.worse(current, found, self._policy) if current is not None else None
        if reason is not None:
            return rollout.refuse(state, f"worse: {reason}", now, version)
        return rollout.begin(state, version, "swap", now)

    def _complain(self, message: str | None) -> None:
        if message is not None and message != self._complaint:
            logger.warning("%s cannot look at %s: %s", self._name, self._follow, message)
        self._complaint = message

    def _reference(self, ref: str) -> str:
        """Return a full reference; the name may be left out.

        Raises:
            UsageError: It is of another model.
        """
        name, _, selector = ref.rpartition("@")
        if name not in ("", self._name):
            raise UsageError(f"{ascii(ref)[:120]} is not a version of {self._name}", "write @VERSION, or @latest")
        return f"{self._name}@{selector}"

    def _set_alias(self, note: str) -> None:
        """Let a followed alias stand for the current version, so that the next start serves it too."""
        state, alias = self._known(), followed_alias(self._follow)
        if alias is None:
            return
        try:
            Registry(self._store).set_alias(self._name, alias, state.current, note)
        except EaglerayError as error:
            logger.warning("the alias %s of %s stays where it is: %s", alias, self._name, error.message)
            return
        self._state = replace(state, followed=state.current)
        self._board.tell(self._state)

    def _renew_lease(self, *, changed: bool) -> None:
        """Keep retention from deleting what a replica may have to load again."""
        if not changed and self._monotonic() - self._leased_at < RENEW_S:
            return
        self._leased_at = self._monotonic()
        state = self._known()
        candidate = state.candidate.version if state.candidate else None
        held = [version for version in (state.current, state.previous, candidate) if version is not None]
        try:
            write_lease(self._store, self._name, self._plan.server, held)
        except StoreError as error:
            logger.warning("%s: retention is not told what is served: %s", self._name, error.message)


def followed_alias(follow: str | None) -> str | None:
    """Return the alias that is followed; None: none is, but `latest`, `best` or nothing at all."""
    if follow is None:
        return None
    try:
        return validate_alias(follow.removeprefix("@"))
    except UsageError:
        return None
