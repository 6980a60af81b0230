"""Asynchronous save and commit from all ranks."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
import torch.distributed as dist

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import AlreadyExistsError, EaglerayError, FencedError, PeersLostError, StoreError
from eagleray.scheduling import give_way
from eagleray.store.dcp import HostShard, StoreWriter, save_together
from eagleray.store.environment import environment_versions
from eagleray.store.manifest import (
    CONFIG_FILE,
    STATE_FILE,
    FileEntry,
    Manifest,
    TensorEntry,
    canonical_json,
    coverage_problem,
    manifest_key,
    version_dir,
    version_name,
)
from eagleray.store.objects import ObjectStore
from eagleray.store.peers import Peers
from eagleray.store.records import now_text
from eagleray.store.runs import RunHandle, check_fence

MAX_FAILURES_IN_A_ROW = 3


@dataclass(frozen=True, slots=True)
class SaveResult:
    """How a save ended.

    Attributes:
        step: The step that was saved.
        ref: Reference of the committed version; None: nothing was committed.
        error: Why not.
        seconds: From the call to the end.
        size_bytes: Bytes of the version; 0 where this rank does not know them.
        fenced: The run was taken over: no later save can succeed either.
    """

    step: int
    ref: str | None
    error: str | None
    seconds: float
    size_bytes: int = 0
    fenced: bool = False


class CheckpointSaver:
    """Saves from all ranks; one per rank, made, called and closed by all of them at the same points.

    `save` copies to the host and returns; a thread writes and commits over a gloo group of its own. Neither `poll`
    nor the thread waits for another rank's main thread. The first rank knows what was committed, and `save` and
    `wait` bring the ranks to its view.

    Args:
        store: The store; the handle's if None.
        run: What this owner may commit.
        process_group: The ranks that save together; None: all, or this process where there are none.
        layout: How the run is cut, for the manifest.
        config: The run's file; it becomes `eagleray.json`.
        best_metric: The score that `best` goes by, and whether greater is better; None: the latest is the best.
        timeout_s: Seconds that a rank may be later than another one; at least those of the largest write.
    """

    def __init__(
        self,
        store: ObjectStore | None,
        run: RunHandle,
        *,
        process_group: dist.ProcessGroup | None = None,
        layout: Layout,
        config: RunConfig,
        best_metric: tuple[str, bool] | None = None,
        timeout_s: float = 600,
    ) -> None:
        self._run = run if store is None else replace(run, store=store)
        self._layout = layout
        self._config = config
        self._best_metric = best_metric
        self._timeout_s = timeout_s
        self._ranks = None
        if dist.is_available() and dist.is_initialized():
            self._ranks = dist.get_process_group_ranks(process_group or dist.group.WORLD)
        # A thread that waits for a lost rank takes `timeout_s`, and a rank may begin to wait that much later.
        self._control = Peers(self._ranks, 3 * timeout_s)
        self._writers = Peers(self._ranks, timeout_s)
        self._folder = f"{run.attempt}-{self._control.all_gather(secrets.token_hex(3))[0]}"
        self._num_saves = 0
        self._failures: list[SaveResult] = []
        self._job: _SaveJob | None = None
        self._unreported: list[SaveResult] = []

    def save(
        self,
        *,
        step: int,
        tensors: Mapping[str, torch.Tensor],
        files: Mapping[str, bytes],
        state: Mapping[str, Any],
        metrics: Mapping[str, float],
        before_commit: Callable[[], None] | None = None,
        copy: bool = True,
    ) -> None:
        """Save a version. Collective; waits for the save in flight, copies to the host, writes in the background.

        Args:
            step: Optimizer steps done.
            tensors: `model.*` and `optim.*`, this rank's part of each; they may change after the return.
            files: What goes beside the tensors, by file name; the first rank's are used.
            state: `state.json`.
            metrics: Scores at this step.
            before_commit: Called on the first rank in the background, when everything but the commit is written:
                what must not be lost once the run can go on from here. What it raises fails the save.
            copy: False: the tensors stay as they are until the save has ended. What is in host memory is then
                written from where it lies, and a rank needs no memory for a second one of all that it holds.

        Raises:
            FencedError: The run was taken over.
            StoreError: Three saves failed in a row.
        """
        self._settle()
        self._num_saves += 1
        self._job = _SaveJob(
            run=self._run,
            step=step,
            peers=self._writers,
            attempt=f"{self._folder}-{self._num_saves}",
            shards=_on_host(tensors, copy=copy),
            files={CONFIG_FILE: _config_json(self._config), STATE_FILE: canonical_json(state), **files},
            manifest={
                "layout": str(self._layout),
                "metrics": {key: float(value) if isfinite(value) else None for key, value in metrics.items()},
                "best_metric": self._best_metric,
            },
            before_commit=before_commit,
        )

    def poll(self) -> list[SaveResult]:
        """Return what ended since the last call. Waits for nothing; each rank may call it whenever it likes."""
        if self._job is not None and not self._job.is_running and not self._job.is_reported:
            self._job.is_reported = True
            self._unreported.append(self._job.result)
        reported, self._unreported = self._unreported, []
        return reported

    def wait(self) -> list[SaveResult]:
        """Wait for the save in flight, then `poll`. Collective.

        Raises:
            FencedError: The run was taken over.
            StoreError: Three saves failed in a row.
        """
        self._settle()
        return self.poll()

    def close(self) -> None:
        """Let the save in flight end, and give the process groups back. Not collective: a rank may be dying."""
        if self._job is not None:
            self._job.join(2 * self._timeout_s)
        self._writers.close()
        self._control.close()

    def _settle(self) -> None:
        """Join the save in flight, agree on how it ended, and raise what all ranks must know."""
        job, self._job = self._job, None
        if job is None:
            return
        job.join(2 * self._timeout_s)
        ended = job.result if not job.is_running else job.stalled(2 * self._timeout_s)
        views = self._control.all_gather((ended, job.is_running or job.lost_peers))
        result = views[0][0]
        if not job.is_reported:
            self._unreported.append(result)
        if any(lost for _, lost in views):
            self._writers = Peers(self._ranks, self._timeout_s)
        self._failures = [*self._failures, result] if result.ref is None else []
        if result.fenced:
            raise FencedError(result.error or "the run was taken over")
        if len(self._failures) >= MAX_FAILURES_IN_A_ROW:
            steps = ", ".join(str(failure.step) for failure in self._failures)
            raise StoreError(
                f"{len(self._failures)} saves in a row failed (steps {steps}); the last one: {result.error}",
                hint=f"Mend the store {self._run.store.location}, then start the run again.",
            )


class _SaveJob:
    """One save in the background."""

    def __init__(
        self,
        *,
        run: RunHandle,
        step: int,
        peers: Peers,
        attempt: str,
        shards: Mapping[str, HostShard],
        files: Mapping[str, bytes],
        manifest: Mapping[str, Any],
        before_commit: Callable[[], None] | None,
    ) -> None:
        # A store that hangs must not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name=f"save-{step}", daemon=True)
        self._run = run
        self._step = step
        self._peers = peers
        self._attempt = attempt
        self._shards = shards
        self._files = files
        self._manifest = manifest
        self._before_commit = before_commit
        self._start_s = time.monotonic()
        self._end_s: float | None = None
        self._size_bytes = 0
        self._committed = False
        self._succeeded = False
        self._error: Exception | None = None
        self.lost_peers = False
        self.is_reported = False
        self._thread.start()

    @property
    def is_running(self) -> bool:
        """Whether the thread is at work."""
        return self._thread.is_alive()

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, but not longer."""
        self._thread.join(timeout_s)

    @property
    def result(self) -> SaveResult:
        """How it ended."""
        ref = f"{self._run.name}@{version_name(self._run.run, self._step)}"
        # What is not known to have succeeded has failed; the first rank knows of a commit whatever came after.
        failed = not (self._succeeded or self._committed)
        return SaveResult(
            step=self._step,
            ref=None if failed else ref,
            error=str(self._error or "the save is not done") if failed else None,
            seconds=(self._end_s or time.monotonic()) - self._start_s,
            size_bytes=self._size_bytes,
            fenced=failed and isinstance(self._error, FencedError),
        )

    def stalled(self, after_s: float) -> SaveResult:
        """What is to be said of a save that does not end."""
        return replace(self.result, ref=None, error=f"the store did not answer within {after_s:.0f} s")

    def _work(self) -> None:
        give_way()
        try:
            if not self._peers.together(lambda: None, self._already_committed):
                self._save()
            self._succeeded = True
        except PeersLostError as error:
            self._error, self.lost_peers = error, True
        except Exception as error:
            # A failure is a value here, whatever its kind: it is reported, and the next save is tried.
            self._error = (
                error if isinstance(error, EaglerayError) else StoreError(f"{type(error).__name__}: {error}")
            )
        finally:
            self._shards = {}
            self._end_s = time.monotonic()

    def _save(self) -> None:
        base = version_dir(self._run.name, version_name(self._run.run, self._step))
        writer = StoreWriter(self._run.store, base, self._attempt, self._peers.rank, self._commit)
        save_together(self._shards, writer, self._peers)

    def _already_committed(self, ranks: list[None]) -> list[bool]:
        key = manifest_key(self._run.name, version_name(self._run.run, self._step))
        self._committed = self._run.store.exists(key)
        return [self._committed] * len(ranks)

    def _commit(self, tensors: tuple[TensorEntry, ...], files: tuple[FileEntry, ...]) -> None:
        """Write the small files and then, if this owner is still the owner, the manifest."""
        files = (*files, *(self._put_file(name, data) for name, data in sorted(self._files.items())))
        manifest = Manifest(
            name=self._run.name,
            run=self._run.run,
            step=self._step,
            epoch=self._run.epoch,
            attempt=self._attempt,
            created=now_text(),
            versions=environment_versions(),
            code_sha256=self._run.code_sha256,
            files=files,
            tensors=tensors,
            **self._manifest,
        )
        problem = coverage_problem(manifest)
        if problem is not None:
            raise StoreError(f"the ranks did not save every tensor once: {problem}")
        if self._before_commit is not None:
            self._before_commit()
        check_fence(self._run)
        key = manifest_key(self._run.name, manifest.version)
        try:
            self._run.store.put_unique(key, manifest.to_bytes())
        except AlreadyExistsError:
            raise StoreError(f"{key} was committed by another save meanwhile") from None
        self._committed = True
        self._size_bytes = manifest.size_bytes

    def _put_file(self, name: str, data: bytes) -> FileEntry:
        entry = FileEntry.of(f"{self._attempt}/{name}", data)
        base = version_dir(self._run.name, version_name(self._run.run, self._step))
        self._run.store.put(f"{base}/{entry.path}", data)
        return entry


def _on_host(tensors: Mapping[str, torch.Tensor], *, copy: bool) -> dict[str, HostShard]:
    parts = {name: HostShard.of(tensor, copy=copy) for name, tensor in tensors.items()}
    return {name: shard for name, shard in parts.items() if shard is not None}


def _config_json(config: RunConfig) -> bytes:
    return canonical_json(config.model_dump(mode="json"))
