"""Our own durable record of a job: it tells what happened also after the cluster is gone.

::

    jobs/<id>/submitted.json   what was asked for, by whom, on which cluster: written before the job is submitted
              started.json     the job runs: written by the job itself
              end.json         how it ended: written by the job itself
              lost.json        that it had died: written by whoever found it so; end.json goes before it
              log.txt          the end of its log
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from eagleray.errors import AlreadyExistsError, NotFoundError
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record, read_record
from eagleray.store.uri import validate_name

Outcome = Literal["succeeded", "failed", "stopped", "died"]
State = Literal["pending", "running", "succeeded", "failed", "stopped", "died", "unreachable"]
EXIT_OUTCOMES: Mapping[int, Outcome] = {0: "succeeded", 130: "stopped", 143: "stopped"}


@dataclass(frozen=True, slots=True)
class JobEnd:
    """How a job ended.

    Attributes:
        outcome: `died` when the job itself could not write it.
        exit_status: Of the verb; None when it died.
        message: The error, or what the cluster says about a death; None after a success.
        hint: What to do.
        result: What the verb printed with `--json`.
    """

    outcome: Outcome
    exit_status: int | None = None
    message: str | None = None
    hint: str | None = None
    result: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class JobRecord:
    """What is known of a job.

    Attributes:
        id: Its name on the cluster and in the store.
        verb: What runs.
        name: The model, where a file names one.
        arguments: The verb's own, with the files by their shipped names.
        address: The cluster's Jobs API.
        submitted: Time.
        details: Who submitted it from where, the versions, the files.
        started: Time; None before it started.
        process: Host and number of the process that it is.
        ended: Time; None before it ended.
        end: How it ended.
    """

    id: str
    verb: str
    name: str
    arguments: tuple[str, ...]
    address: str
    submitted: str = ""
    details: dict[str, Any] = field(default_factory=dict)
    started: str | None = None
    process: tuple[str, int] | None = None
    ended: str | None = None
    end: JobEnd | None = None


@dataclass(frozen=True, slots=True)
class RayJob:
    """What a cluster says of a job.

    Attributes:
        status: Ray's word.
        message: Ray's explanation.
    """

    status: Literal["PENDING", "RUNNING", "SUCCEEDED", "FAILED", "STOPPED"]
    message: str | None = None

    @property
    def is_over(self) -> bool:
        """Whether it does not run any more."""
        return self.status not in ("PENDING", "RUNNING")


def decide_state(record: JobRecord, found: RayJob | None, *, is_reachable: bool) -> State:
    """Say what state a job is in.

    Args:
        record: Our own record.
        found: What the cluster says of it; None when it does not know the job.
        is_reachable: Whether the cluster answered.
    """
    if record.end is not None:
        return record.end.outcome
    if not is_reachable:
        return "unreachable"
    if found is None or found.is_over:
        return "died"
    return "pending" if found.status == "PENDING" and record.started is None else "running"


class JobRecords:
    """The records of the jobs of a store."""

    def __init__(self, store: ObjectStore) -> None:
        self._store = store

    @property
    def store(self) -> ObjectStore:
        """Where they are."""
        return self._store

    def submit(self, record: JobRecord) -> None:
        """Write that a job is about to be submitted.

        Raises:
            AlreadyExistsError: There is a job of that id.
        """
        values = {
            "id": record.id,
            "verb": record.verb,
            "name": record.name,
            "arguments": list(record.arguments),
            "address": record.address,
            **record.details,
        }
        create_record(self._store, self._key(record.id, "submitted.json"), values)

    def start(self, job_id: str, details: Mapping[str, Any]) -> None:
        """Write that a job runs; a second start of the same job changes nothing."""
        self._create(job_id, "started.json", details)

    def finish(self, job_id: str, end: JobEnd) -> None:
        """Write how a job ended; who comes second changes nothing."""
        self._create(job_id, "end.json", _values(end))

    def bury(self, job_id: str, end: JobEnd) -> None:
        """Write that a job was found to be dead; should it live, its own word goes before this one."""
        self._create(job_id, "lost.json", _values(end))

    def put_log(self, job_id: str, data: bytes) -> None:
        """Keep the end of a job's log."""
        self._store.put(self._key(job_id, "log.txt"), data)

    def log(self, job_id: str) -> str | None:
        """Return what was kept of a job's log."""
        try:
            return self._store.get(self._key(job_id, "log.txt")).decode("utf-8", errors="replace")
        except NotFoundError:
            return None

    def get(self, job_id: str) -> JobRecord:
        """Read a record.

        Raises:
            NotFoundError: There is no job of that id.
        """
        submitted = self._read(job_id, "submitted.json")
        if submitted is None:
            raise NotFoundError(
                f"there is no job {job_id} in the store {self._store.location}",
                "See `eagleray jobs list`; --store names the store that the job was submitted with.",
            )
        started = self._read(job_id, "started.json")
        ended = self._read(job_id, "end.json") or self._read(job_id, "lost.json")
        known = ("id", "verb", "name", "arguments", "address", "created", "nonce")
        return JobRecord(
            id=job_id,
            verb=submitted["verb"],
            name=submitted["name"],
            arguments=tuple(submitted["arguments"]),
            address=submitted["address"],
            submitted=submitted["created"],
            details={key: value for key, value in submitted.items() if key not in known},
            started=started["created"] if started else None,
            process=(started["host"], started["pid"]) if started and "pid" in started else None,
            ended=ended["created"] if ended else None,
            end=_end(ended) if ended else None,
        )

    def all(self) -> list[JobRecord]:
        """Read every record, the newest last."""
        found = [self.get(job_id) for job_id in self._store.children("jobs")]
        return sorted(found, key=lambda record: record.submitted)

    def _create(self, job_id: str, name: str, values: Mapping[str, Any]) -> None:
        try:
            create_record(self._store, self._key(job_id, name), values)
        except AlreadyExistsError:
            pass  # the first one to say it counts

    def _read(self, job_id: str, name: str) -> dict[str, Any] | None:
        try:
            return read_record(self._store, self._key(job_id, name))
        except NotFoundError:
            return None

    @staticmethod
    def _key(job_id: str, name: str) -> str:
        return f"jobs/{validate_name(job_id)}/{name}"


def _values(end: JobEnd) -> dict[str, Any]:
    return {
        "outcome": end.outcome,
        "exit_status": end.exit_status,
        "message": end.message,
        "hint": end.hint,
        "result": end.result,
    }


def _end(values: Mapping[str, Any]) -> JobEnd:
    return JobEnd(values["outcome"], values["exit_status"], values["message"], values["hint"], values["result"])
