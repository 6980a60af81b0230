"""Submit, find, follow and stop jobs: the cluster's word and our own record together."""

from __future__ import annotations

import getpass
import secrets
import socket
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import eagleray
from eagleray.errors import EaglerayError, RunFailedError, UsageError
from eagleray.store.owner import DEFAULT_TIMING, Timing
from eagleray_jobs.submit.api import JobsApi
from eagleray_jobs.submit.lost import stop_through_store
from eagleray_jobs.submit.parcel import STOP_WAIT_S, Parcel, entrypoint, environment
from eagleray_jobs.submit.records import JobEnd, JobRecord, JobRecords, RayJob, State, decide_state

POLL_S = 0.5
END_RECORD_WAIT_S = 10.0
"""A job that the cluster calls over has written its end, unless it died."""

Open = Callable[[str], JobsApi]


@dataclass(frozen=True, slots=True)
class FoundJob:
    """A job and the state that it is in."""

    record: JobRecord
    state: State


class Jobs:
    """The jobs of a store.

    Args:
        records: Our own records.
        open_api: Opens the Jobs API of an address; raises `UsageError` where nothing answers.
        address: Where to ask instead of the address that a record holds.
        timing: Of watching a run whose cluster does not answer.
    """

    def __init__(
        self, records: JobRecords, open_api: Open, address: str | None = None, timing: Timing = DEFAULT_TIMING
    ) -> None:
        self._records = records
        self._timing = timing
        self._open_api = open_api
        self._address = address
        self._opened: dict[str, JobsApi | UsageError] = {}

    def submit(self, parcel: Parcel, address: str) -> JobRecord:
        """Submit a verb, record first, so that no job runs that the store knows nothing of.

        Raises:
            EaglerayError: The cluster did not take it; the record says so.
        """
        api = self._open_api(address)
        record = _new_record(parcel, address)
        self._records.submit(record)
        try:
            with tempfile.TemporaryDirectory(prefix="eagleray-job-") as staging:
                runtime_env = environment(record.id, parcel, Path(staging))
                api.submit(record.id, entrypoint(record.id, parcel), runtime_env)
        except BaseException as error:
            self._records.finish(record.id, JobEnd("failed", None, f"it was not submitted: {error}"))
            raise
        return record

    def find(self, job_id: str) -> FoundJob:
        """Return a job and its state; one that is found to have died is recorded as such.

        Raises:
            NotFoundError: There is no job of that id.
        """
        return self._judge(self._records.get(job_id))

    def all(self) -> list[FoundJob]:
        """Return every job, the newest last."""
        return [self._judge(record) for record in self._records.all()]

    def stop(self, job_id: str, notify: Callable[[str], None]) -> FoundJob:
        """Ask a job to commit and stop, and return when it has ended.

        Where its cluster does not answer, a run that lives is asked through the store; one that does not is
        recorded as dead.

        Raises:
            RunFailedError: It had not ended after its time to stop.
        """
        found = self.find(job_id)
        if found.record.end is not None:
            return found
        if found.state == "unreachable":
            end = stop_through_store(self._records.store, found.record, notify, self._timing)
            if end is not None:
                self._records.bury(job_id, end)
        else:
            self._api(found.record).stop(job_id)
            notify(f"{job_id} was asked to commit and stop")
        return self._await_end(job_id, STOP_WAIT_S + 60)

    def follow(self, job_id: str, write: Callable[[str], None]) -> FoundJob:
        """Write a job's log while it grows, until the job is over."""
        record = self._records.get(job_id)
        for piece in self._api(record).logs(job_id, follow=True):
            write(piece)
        return self._await_end(job_id, END_RECORD_WAIT_S)

    def log(self, job_id: str) -> str:
        """Return a job's log: the cluster's, or what the store kept of it.

        Raises:
            UsageError: The cluster does not answer, and the store kept nothing.
        """
        record = self._records.get(job_id)
        if (kept := self._records.log(job_id)) is not None:
            return kept
        return "".join(self._api(record).logs(job_id, follow=False))

    def _await_end(self, job_id: str, timeout_s: float) -> FoundJob:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            found = self.find(job_id)
            if found.state not in ("pending", "running", "unreachable"):
                return found
            time.sleep(POLL_S)
        raise RunFailedError(f"{job_id} has not ended after {timeout_s:g} s", "See `eagleray jobs logs`.")

    def _judge(self, record: JobRecord) -> FoundJob:
        if record.end is not None:
            return FoundJob(record, record.end.outcome)
        try:
            ray_job = self._api(record).find(record.id)
        except EaglerayError:
            return FoundJob(record, "unreachable")
        state = decide_state(record, ray_job, is_reachable=True)
        if state != "died":
            return FoundJob(record, state)
        return self._bury(record.id, ray_job)

    def _bury(self, job_id: str, ray_job: RayJob | None) -> FoundJob:
        """Record the death of a job, unless it wrote its own end meanwhile."""
        record = self._records.get(job_id)
        if record.end is None:
            status = "does not know it" if ray_job is None else f"calls it {ray_job.status}"
            says = f": {ray_job.message}" if ray_job is not None and ray_job.message else ""
            message = f"it ended without a word; the cluster {status}{says}"
            self._records.bury(job_id, JobEnd("died", None, message, "Submit it again: it goes on where it was."))
            record = self._records.get(job_id)
        return FoundJob(record, record.end.outcome if record.end else "died")

    def _api(self, record: JobRecord) -> JobsApi:
        address = self._address or record.address
        if address not in self._opened:
            try:
                self._opened[address] = self._open_api(address)
            except UsageError as error:
                self._opened[address] = error  # so that a list of jobs asks a dead cluster once
        opened = self._opened[address]
        if isinstance(opened, UsageError):
            raise opened
        return opened


def _new_record(parcel: Parcel, address: str) -> JobRecord:
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    parts = ["eagleray", parcel.verb, parcel.name, now, secrets.token_hex(2)]
    return JobRecord(
        id="-".join(part for part in parts if part)[:128],
        verb=parcel.verb,
        name=parcel.name,
        arguments=parcel.arguments,
        address=address,
        details={
            "user": getpass.getuser(),
            "host": socket.gethostname(),
            "eagleray": eagleray.__version__,
            "files": parcel.files,
        },
    )
