"""Versions without weights, and a server without Ray: a controller, replicas and the notes between them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import CheckpointSaver
from eagleray_serving.answering import Answers, Asking
from eagleray_serving.board import Board
from eagleray_serving.catalog import ModelCard
from eagleray_serving.controller import Controller
from eagleray_serving.follower import Follower, Loading
from eagleray_serving.plan import ModelPlan
from eagleray_serving.rollout import Rollout
from eagleray_serving.room import NoRoomError
from eagleray_serving.split import Split
from eagleray_serving.trial import Recorded, Recorder
from eagleray_serving.versions import Loaded, Versions

NAME = "en-fr"
V1, V2, V3 = (f"r1-step-{step:08d}" for step in (1, 2, 3))


class FakeLoaded:
    """Answers with its version and the item; waits for `go`, if that is not set."""

    def __init__(self, version: str, fault: Callable[[], Answers] | None = None) -> None:
        self.version = version
        self.go = asyncio.Event()
        self.go.set()
        self.closed = False
        self.trouble: str | None = None
        self._fault = fault

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        assert not self.closed
        await self.go.wait()
        if self._fault is not None:
            return self._fault()
        return Answers(self.version, [{"text": f"{self.version} {item['text']}"} for item in items])

    async def close(self) -> None:
        self.closed = True


def ask(versions: Versions, id: str) -> Any:
    return versions.answer([{"text": id}], {}, Asking(id))


class DictNotes:
    """Notes that a test can look at."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def read(self, key: str) -> bytes | None:
        return self.values.get(key)

    def write(self, key: str, value: bytes) -> None:
        with self._lock:
            self.values[key] = value

    def keys(self, prefix: str) -> list[str]:
        with self._lock:
            return [key for key in self.values if key.startswith(prefix)]

    def remove(self, key: str) -> None:
        with self._lock:
            self.values.pop(key, None)


def commit(store: ObjectStore, step: int, **metrics: float) -> str:
    """Commit a version of one number; returns its name."""
    config = RunConfig.model_validate(
        {"name": NAME, "task": "translation", "model": {"family": "marian"}, "data": {"source": "cldr-en-fr"}}
    )
    if not store.exists(epoch_key(NAME, 1, 1)):
        create_record(store, epoch_key(NAME, 1, 1), {"owner": {"host": "elsewhere", "pid": 1}})
    run = RunHandle(store, NAME, run=1, epoch=1, attempt="a")
    saver = CheckpointSaver(store, run, layout=Layout(), config=config, best_metric=("chrf", True), timeout_s=20)
    saver.save(step=step, tensors={"model.w": torch.ones(1)}, files={}, state={}, metrics=metrics)
    (result,) = saver.wait()
    saver.close()
    assert result.ref is not None, result.error
    return result.ref.partition("@")[2]


class Replica:
    """What one replica holds, and what it is told to fail."""

    def __init__(self, site: Site, name: str) -> None:
        self.site = site
        self.failures: dict[str, Exception] = {}
        self.room: str | None = None
        self.loads: list[tuple[str, bool]] = []
        self.num_held = self.most_held = 1
        board = Board(site.notes, site.plan.server, NAME)
        state = board.rollout()
        self.versions = Versions(FakeLoaded(site.plan.card.version if state is None else state.current))
        loading = Loading(self._beside, self._load)
        self.follower = Follower(name, self.versions, Recorder(), board, loading)

    def _beside(self, version: str, examples: Sequence[Recorded] | None) -> Loaded:
        if self.room is not None:
            raise NoRoomError(self.room)
        return self._load(version, examples)

    def _load(self, version: str, examples: Sequence[Recorded] | None) -> Loaded:
        self.loads.append((version, examples is not None))
        self.most_held = max(self.most_held, len(self.versions.loaded) + 1)
        if version in self.failures:
            raise self.failures[version]
        return FakeLoaded(version)

    @property
    def split(self) -> Split | None:
        return self.versions.split


class Site:
    """A server of one model, whose time passes when a test says so.

    Args:
        folder: Where its store is.
        num_replicas: How many there are.
        serve: The file's `serve` section.
    """

    def __init__(self, folder: Path, num_replicas: int = 2, **serve: Any) -> None:
        self.store = ObjectStore.open(str(folder / "store"))
        commit(self.store, 1, chrf=50.0)
        self.notes = DictNotes()
        self.now = 1000.0
        card = ModelCard(NAME, V1, "translate", "text")
        limits = ServeConfig.model_validate(serve)
        self.plan = ModelPlan(str(folder / "store"), card, ("source",), limits, server="server-1")
        self.controller = self.new_controller()
        self.replicas = [Replica(self, f"replica-{number}") for number in range(num_replicas)]

    def new_controller(self) -> Controller:
        board = Board(self.notes, self.plan.server, NAME)
        return Controller(self.plan, board, clock=lambda: self.now, monotonic=lambda: self.now)

    def state(self) -> Rollout:
        found = Board(self.notes, self.plan.server, NAME).rollout()
        assert found is not None
        return found

    async def pass_time(self, num_steps: int = 8) -> None:
        """Let seconds pass: everybody takes a step in each."""
        for _ in range(num_steps):
            self.now += 1
            await asyncio.to_thread(self.controller.step)
            for replica in self.replicas:
                await replica.follower.step()

    def answering(self) -> list[Split | None]:
        return [replica.split for replica in self.replicas]
