"""What the ranks do in the tests of saves that fail; module-level functions, sent by their import path."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from checkpoints import NAME, config, laid_out, owned_run, whole_tensors

from eagleray.config.layout import Layout
from eagleray.errors import EaglerayError, StoreError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import Data, ObjectStore
from eagleray.store.records import create_record
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import CheckpointSaver, SaveResult
from eagleray.store.sharing import check_shared
from eagleray.store.uri import parse_store_uri

GROUP_TIMEOUT_S = 2.0


class FailingStore(ObjectStore):
    """Fails in its own way while it is told to."""

    def __init__(self, location: str, fault: str | None = None) -> None:
        super().__init__(parse_store_uri(location))
        self.fault = fault

    def put(self, key: str, data: Data, *, create: bool = False) -> None:
        if "/r1-step-" in key:
            if self.fault == "refuse":
                raise StoreError(f"refused: {key}")
            if self.fault == "break":
                raise ZeroDivisionError("not a store's error")
            if self.fault == "stall":
                time.sleep(2.5 * GROUP_TIMEOUT_S)
            if self.fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
        super().put(key, data, create=create)


def saver_on(store: ObjectStore) -> CheckpointSaver:
    if dist.get_rank() == 0:
        owned_run(store)
    dist.barrier()
    run = RunHandle(store, NAME, 1, 1, "a")
    return CheckpointSaver(None, run, layout=Layout(), config=config(), timeout_s=GROUP_TIMEOUT_S)


def save_step(saver: CheckpointSaver, step: int, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
    cut = tensors if tensors is not None else laid_out(whole_tensors())
    saver.save(step=step, tensors=cut, files={}, state={"step": step}, metrics={})


def fail_once(location: str, fault: str, failing_rank: int) -> list[SaveResult]:
    """Save 1, save 2 with a fault on one rank, save 3."""
    store = FailingStore(location)
    saver = saver_on(store)
    results = []
    for step in (1, 2, 3):
        store.fault = fault if step == 2 and dist.get_rank() == failing_rank else None
        save_step(saver, step)
        results += saver.wait()
    saver.close()
    return results


def fail_three_times(location: str, failing_rank: int) -> tuple[list[str | None], str]:
    """Save until it raises; the steps' errors and what was raised."""
    saver = saver_on(FailingStore(location, "refuse" if dist.get_rank() == failing_rank else None))
    errors: list[str | None] = []
    for step in (1, 2, 3):
        save_step(saver, step)
        try:
            errors += [result.error for result in saver.wait()]
        except StoreError as error:
            saver.close()
            return errors, error.message
    raise AssertionError("nothing was raised")


def be_taken_over(location: str) -> str:
    """Save after another owner took the run."""
    store = ObjectStore.open(location)
    saver = saver_on(store)
    if dist.get_rank() == 0:
        create_record(store, epoch_key(NAME, 1, 2), {"owner": {"host": "another-host", "pid": 7}})
    dist.barrier()
    save_step(saver, 1)
    try:
        saver.wait()
    except EaglerayError as error:
        return f"{type(error).__name__}: {error.message}"
    finally:
        saver.close()
    return "committed"


def die_in_a_save(location: str, dying_rank: int) -> None:
    """Save 1, then save 2 while one rank is killed; the others leave what they saw in a file."""
    store = FailingStore(location)
    saver = saver_on(store)
    save_step(saver, 1)
    saver.wait()
    store.fault = "die" if dist.get_rank() == dying_rank else None
    save_step(saver, 2)
    try:
        saver.wait()
        seen = "no error"
    except StoreError as error:
        seen = type(error).__name__
    Path(location, f"seen-by-{dist.get_rank()}").write_text(seen)


def save_beside_all_reduce(location: str, num_saves: int) -> tuple[int, float]:
    """Save while the training's own collectives go on; the commits, and the sum that the collectives gave."""
    saver = saver_on(ObjectStore.open(location))
    total, num_committed = torch.zeros(1), 0
    for step in range(1, num_saves + 1):
        save_step(saver, step)
        for _ in range(20):
            one = torch.ones(1000)
            dist.all_reduce(one)
            total += one[0]
        num_committed += len([result for result in saver.poll() if result.ref])
    num_committed += len([result for result in saver.wait() if result.ref])
    saver.close()
    return num_committed, float(total)


def load_damaged(location: str, version: str) -> str:
    """Load a checkpoint of which one rank's part is damaged."""
    tensors = laid_out({name: torch.zeros_like(tensor) for name, tensor in whole_tensors().items()})
    try:
        Checkpoint.open(ObjectStore.open(location), NAME, version).load_into(tensors)
    except EaglerayError as error:
        return f"{type(error).__name__}: {error.message}"
    return "loaded"


def look_whether_it_is_shared(locations: list[str]) -> str:
    """Each rank has its own location under the name of the first."""
    store = ObjectStore.open(locations[dist.get_rank()])
    try:
        check_shared(RunHandle(store, NAME, 1, 1, "a"))
    except StoreError as error:
        return error.message
    return "shared"
