"""Jobs whose cluster does not answer: what the store alone tells of them, and how they are stopped through it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from eagleray.errors import NotFoundError
from eagleray.store.objects import ObjectStore
from eagleray.store.owner import DEFAULT_TIMING, Owner, Timing, is_alive
from eagleray.store.records import read_record
from eagleray.store.runs import RunHandle, epoch_key, highest_epoch, request_stop, run_numbers
from eagleray_jobs.submit.records import JobEnd, JobRecord

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class OwnedRun:
    """The run that a job owns, as the store knows it."""

    handle: RunHandle
    owner: Owner

    def is_alive(self, timing: Timing, notify: Notify) -> bool:
        """Whether its owner lives; watches its beat."""
        handle = self.handle
        return is_alive(
            handle.store, handle.name, handle.run, handle.epoch, self.owner, timing=timing, notify=notify
        )


def find_owned_run(store: ObjectStore, record: JobRecord) -> OwnedRun | None:
    """Return the run of a training job that has not ended; None: it owns none."""
    if record.verb != "train" or record.process is None or not record.name:
        return None
    run = max(run_numbers(store, record.name), default=None)
    epoch = highest_epoch(store, record.name, run) if run is not None else None
    if run is None or epoch is None or store.exists(epoch_key(record.name, run, epoch, ".end")):
        return None
    try:
        owner = Owner.from_record(read_record(store, epoch_key(record.name, run, epoch))["owner"])
    except NotFoundError:
        return None
    if (owner.host, owner.pid) != record.process:
        return None  # somebody else has taken the run over
    return OwnedRun(RunHandle(store, record.name, run, epoch, attempt=""), owner)


def stop_through_store(
    store: ObjectStore, record: JobRecord, notify: Notify, timing: Timing = DEFAULT_TIMING
) -> JobEnd | None:
    """Ask the run of a job to commit and stop, where it lives.

    Args:
        store: The store of both.
        record: The job.
        notify: Told what is done.
        timing: Of the watch.

    Returns:
        How the job ended, as far as anybody can tell; None: its run lives and was asked to stop.
    """
    owned = find_owned_run(store, record)
    gone = f"its cluster at {record.address} does not answer"
    if owned is not None and owned.is_alive(timing, notify):
        request_stop(owned.handle)
        notify(f"{gone}, but its run lives: it was asked through the store to commit and stop")
        return None
    if owned is not None:
        run = f"run r{owned.handle.run} of {record.name}"
        sign = f"{owned.owner}, which owned {run}, is gone"
    else:
        sign = "it owns no run that could be watched" if record.started else "it never started"
    notify(f"{gone}, and {sign}: it counts as dead")
    hint = "Submit it again: it goes on where it was. Should it still live, its own word replaces this one."
    return JobEnd("died", None, f"{gone}, and {sign}", hint)
