"""The records of a run: what it is, who owns it, who asked it to stop, how it ended.

::

    runs/<name>/r2/run.json                  the run, taken create-only: its config and environment
                   epochs/00000001.json      who owns it, taken create-only; the highest counts
                   epochs/00000001.stop.json somebody asked that owner to commit and stop
                   epochs/00000001.end.json  how that owner ended
                   beat.json                 renewed by the owner while it lives
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from eagleray.errors import FencedError, NotFoundError
from eagleray.store.objects import ObjectStore
from eagleray.store.records import read_record, write_record

_EPOCH = re.compile(r"(\d{8})\.json")
_RUN = re.compile(r"r([1-9]\d*)")


@dataclass(frozen=True, slots=True)
class RunHandle:
    """What a worker needs to commit; it crosses processes.

    Attributes:
        store: The store.
        name: The model's name.
        run: Number of the run, from 1.
        epoch: Number of the ownership that this handle belongs to, from 1.
        attempt: Name of the start of the workers; part of the folder names of its saves.
        code_sha256: Hash of the user's own code, for the manifests.
    """

    store: ObjectStore
    name: str
    run: int
    epoch: int
    attempt: str
    code_sha256: str | None = None


def run_dir(name: str, run: int) -> str:
    """The prefix of a run's objects."""
    return f"runs/{name}/r{run}"


def run_key(name: str, run: int) -> str:
    """The key of a run's record."""
    return f"{run_dir(name, run)}/run.json"


def epoch_key(name: str, run: int, epoch: int, suffix: str = "") -> str:
    """The key of an ownership's record; the suffix `.stop` or `.end` of what belongs to it."""
    return f"{run_dir(name, run)}/epochs/{epoch:08d}{suffix}.json"


def run_numbers(store: ObjectStore, name: str) -> list[int]:
    """The numbers of a name's runs, in order."""
    matches = [_RUN.fullmatch(child) for child in store.children(f"runs/{name}")]
    numbers = sorted(int(match[1]) for match in matches if match)
    # A folder is there before the first record in it.
    return [number for number in numbers if store.exists(run_key(name, number))]


def highest_epoch(store: ObjectStore, name: str, run: int) -> int | None:
    """The ownership that counts; None: nobody took the run yet."""
    names = [info.key.rsplit("/", 1)[-1] for info in store.list(f"{run_dir(name, run)}/epochs")]
    epochs = [int(match[1]) for match in map(_EPOCH.fullmatch, names) if match]
    return max(epochs, default=None)


def check_fence(handle: RunHandle) -> None:
    """Make sure that this owner is still the owner.

    Raises:
        FencedError: Somebody took the run over.
    """
    epoch = highest_epoch(handle.store, handle.name, handle.run)
    if epoch is None or epoch > handle.epoch:
        raise FencedError(
            f"run r{handle.run} of {handle.name} was taken over{_new_owner(handle, epoch)}; "
            "this process may no longer commit",
            hint="The new owner goes on from the last commit. Nothing is to be done here.",
        )


def request_stop(handle: RunHandle) -> None:
    """Ask the workers of this ownership to commit and stop."""
    write_record(handle.store, epoch_key(handle.name, handle.run, handle.epoch, ".stop"), {})


def stop_requested(handle: RunHandle) -> bool:
    """Whether somebody asked the workers of this ownership to commit and stop."""
    return handle.store.exists(epoch_key(handle.name, handle.run, handle.epoch, ".stop"))


def _new_owner(handle: RunHandle, epoch: int | None) -> str:
    if epoch is None:
        return " and removed"
    try:
        record: dict[str, Any] = read_record(handle.store, epoch_key(handle.name, handle.run, epoch))
        return f" by process {record['owner']['pid']} on {record['owner']['host']}"
    except (NotFoundError, KeyError, TypeError):
        return ""
