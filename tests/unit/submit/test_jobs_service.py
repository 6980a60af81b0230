"""Jobs without a cluster: our own records, and what is made of the cluster's word."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from eagleray.errors import NotFoundError, UsageError
from eagleray.store.claim import RunClaim, claim_run
from eagleray.store.objects import ObjectStore
from eagleray.store.owner import Timing
from eagleray.store.records import read_record
from eagleray.store.runs import epoch_key, stop_requested
from eagleray_jobs.submit.parcel import Parcel, pack
from eagleray_jobs.submit.records import JobEnd, JobRecord, JobRecords, RayJob, decide_state
from eagleray_jobs.submit.service import FoundJob, Jobs

ADDRESS = "http://cluster:8265"
FILE = (
    "name: en-fr\ntask: translation\nmodel: {family: marian}\ndata: {source: cldr-en-fr}\ntrain: {max_steps: 9}\n"
)


class FakeCluster:
    """A cluster in memory."""

    def __init__(self) -> None:
        self.jobs: dict[str, RayJob] = {}
        self.submitted: list[tuple[str, dict[str, Any]]] = []
        self.stopped: list[str] = []
        self.refuses: str | None = None

    def submit(self, job_id: str, entrypoint: str, runtime_env: dict[str, Any]) -> None:
        if self.refuses is not None:
            raise UsageError(self.refuses)
        self.submitted.append((entrypoint, runtime_env))
        self.jobs[job_id] = RayJob("PENDING")

    def find(self, job_id: str) -> RayJob | None:
        return self.jobs.get(job_id)

    def stop(self, job_id: str) -> None:
        self.stopped.append(job_id)
        self.jobs[job_id] = RayJob("STOPPED")

    def logs(self, job_id: str, *, follow: bool) -> Iterator[str]:
        yield from ("one\n", "two\n")


@pytest.fixture
def records(tmp_path: Path) -> JobRecords:
    return JobRecords(ObjectStore.open(str(tmp_path / "store")))


@pytest.fixture
def cluster() -> FakeCluster:
    return FakeCluster()


@pytest.fixture
def jobs(records: JobRecords, cluster: FakeCluster) -> Jobs:
    return Jobs(records, lambda _: cluster)


@pytest.fixture
def parcel(tmp_path: Path) -> Parcel:
    path = tmp_path / "file.yaml"
    path.write_text(FILE)
    return pack("train", [str(path), "train.max_steps=5", "--new-run"], str(tmp_path / "store"))


@pytest.mark.parametrize(
    "end, started, found, is_reachable, state",
    [
        (None, None, RayJob("PENDING"), True, "pending"),
        (None, "then", RayJob("RUNNING"), True, "running"),
        (None, "then", RayJob("FAILED"), True, "died"),
        (None, "then", None, True, "died"),
        (None, "then", None, False, "unreachable"),
        (JobEnd("stopped", 143), "then", RayJob("RUNNING"), True, "stopped"),
        (JobEnd("succeeded", 0), "then", None, False, "succeeded"),
    ],
)
def test_our_own_record_of_the_end_goes_before_the_clusters_word(
    end: JobEnd | None, started: str | None, found: RayJob | None, is_reachable: bool, state: str
) -> None:
    record = JobRecord("j", "train", "m", (), ADDRESS, started=started, end=end)
    assert decide_state(record, found, is_reachable=is_reachable) == state


def test_a_submitted_job_is_recorded_before_it_runs(
    jobs: Jobs, records: JobRecords, cluster: FakeCluster, parcel: Parcel
) -> None:
    record = jobs.submit(parcel, ADDRESS)
    kept = records.get(record.id)
    assert (kept.verb, kept.name, kept.address) == ("train", "en-fr", ADDRESS)
    assert kept.arguments == ("en-fr.yaml", "--new-run")
    assert kept.details["files"]["en-fr.yaml"]["train"]["max_steps"] == 5
    assert jobs.find(record.id).state == "pending"
    ((command, _),) = cluster.submitted
    assert command.startswith('exec "${EAGLERAY_PYTHON:-python3}" -m eagleray_jobs.submit.entry --store /')
    assert command.endswith(f"--id {record.id} -- train en-fr.yaml --new-run")


def test_a_job_that_the_cluster_refuses_is_recorded_as_failed(
    jobs: Jobs, cluster: FakeCluster, parcel: Parcel
) -> None:
    cluster.refuses = "no room"
    with pytest.raises(UsageError, match="no room"):
        jobs.submit(parcel, ADDRESS)
    (found,) = jobs.all()
    assert found.state == "failed"
    assert found.record.end is not None
    assert found.record.end.message == "it was not submitted: no room"


def test_a_job_that_died_without_a_word_is_recorded_as_such_for_good(
    jobs: Jobs, records: JobRecords, cluster: FakeCluster, parcel: Parcel
) -> None:
    job_id = jobs.submit(parcel, ADDRESS).id
    records.start(job_id, {})
    cluster.jobs[job_id] = RayJob("FAILED", "the supervisor died")
    assert jobs.find(job_id).state == "died"
    end = records.get(job_id).end
    assert end is not None
    assert end.message == "it ended without a word; the cluster calls it FAILED: the supervisor died"
    assert end.hint == "Submit it again: it goes on where it was."


def test_a_job_whose_cluster_is_gone_still_tells_how_it_ended(
    records: JobRecords, jobs: Jobs, parcel: Parcel
) -> None:
    ended, open_end = jobs.submit(parcel, ADDRESS).id, jobs.submit(parcel, ADDRESS).id
    records.finish(ended, JobEnd("succeeded", 0, result={"ref": "en-fr@r1-step-00000005"}))
    records.put_log(ended, b"the log\n")
    asked = []

    def gone(address: str) -> FakeCluster:
        asked.append(address)
        raise UsageError(f"no Jobs API answers at {address}")

    later = Jobs(records, gone)
    assert {each.record.id: each.state for each in later.all()} == {ended: "succeeded", open_end: "unreachable"}
    assert later.log(ended) == "the log\n"
    with pytest.raises(UsageError, match="no Jobs API answers at http://cluster:8265"):
        later.log(open_end)
    assert asked == [ADDRESS]


FAST = Timing(beat_s=0.02, watch_s=0.3, poll_s=0.02)


@dataclass
class LostJob:
    """A training job that runs on a cluster which does not answer any more."""

    jobs: Jobs
    records: JobRecords
    id: str
    claim: RunClaim
    notes: list[str]

    def stop(self) -> FoundJob:
        return self.jobs.stop(self.id, self.notes.append)


@pytest.fixture
def lost(jobs: Jobs, records: JobRecords, parcel: Parcel) -> Iterator[LostJob]:
    def gone(address: str) -> FakeCluster:
        raise UsageError(f"no Jobs API answers at {address}")

    job_id = jobs.submit(parcel, ADDRESS).id
    records.start(job_id, {"host": socket.gethostname(), "pid": os.getpid()})
    claim = claim_run(records.store, parcel.loaded[0].config, notify=lambda _: None, timing=FAST)
    assert isinstance(claim, RunClaim)
    with claim:
        yield LostJob(Jobs(records, gone, timing=FAST), records, job_id, claim, [])


def test_a_run_that_lives_on_a_cluster_that_does_not_answer_is_stopped_through_the_store(lost: LostJob) -> None:
    def work() -> None:
        while not stop_requested(lost.claim.handle):
            time.sleep(0.01)
        lost.records.finish(lost.id, JobEnd("stopped", 143))

    job = threading.Thread(target=work, daemon=True)
    job.start()
    assert lost.stop().state == "stopped"
    assert lost.notes == [
        f"its cluster at {ADDRESS} does not answer, but its run lives: "
        "it was asked through the store to commit and stop"
    ]
    job.join(10)


def test_a_job_whose_run_died_with_its_cluster_is_recorded_as_dead_unless_it_says_otherwise(
    lost: LostJob,
) -> None:
    key = epoch_key("en-fr", 1, 1)
    values = read_record(lost.records.store, key)
    elsewhere = {**values["owner"], "machine": "another one"}
    lost.records.store.put(key, json.dumps({**values, "owner": elsewhere}).encode())
    lost.claim._stop_beating()  # as a power cut does
    found = lost.stop()
    assert found.state == "died" and found.record.end is not None
    assert f"its cluster at {ADDRESS} does not answer, and process {os.getpid()} of" in str(
        found.record.end.message
    )
    assert "which owned run r1 of en-fr, is gone" in lost.notes[-1]
    assert lost.jobs.find(lost.id).state == "died"
    lost.records.finish(lost.id, JobEnd("succeeded", 0))
    assert lost.jobs.find(lost.id).state == "succeeded"


def test_a_job_that_never_started_on_a_cluster_that_is_gone_is_recorded_as_dead(
    lost: LostJob, jobs: Jobs, parcel: Parcel
) -> None:
    pending = jobs.submit(parcel, ADDRESS).id
    found = lost.jobs.stop(pending, lost.notes.append)
    assert found.state == "died" and found.record.end is not None
    assert found.record.end.message == f"its cluster at {ADDRESS} does not answer, and it never started"


def test_the_first_end_counts(records: JobRecords, jobs: Jobs, parcel: Parcel) -> None:
    job_id = jobs.submit(parcel, ADDRESS).id
    records.finish(job_id, JobEnd("stopped", 143))
    records.finish(job_id, JobEnd("died"))
    assert jobs.find(job_id).state == "stopped"


def test_a_stop_is_asked_of_the_cluster_once_and_waits_for_the_end(
    jobs: Jobs, cluster: FakeCluster, parcel: Parcel
) -> None:
    job_id = jobs.submit(parcel, ADDRESS).id
    cluster.jobs[job_id] = RayJob("RUNNING")
    notes: list[str] = []
    assert jobs.stop(job_id, notes.append).state == "died"  # this cluster's job wrote no end
    assert jobs.stop(job_id, notes.append).state == "died"
    assert cluster.stopped == [job_id]
    assert notes == [f"{job_id} was asked to commit and stop"]


def test_a_log_is_followed_piece_by_piece(jobs: Jobs, records: JobRecords, parcel: Parcel) -> None:
    job_id = jobs.submit(parcel, ADDRESS).id
    records.finish(job_id, JobEnd("failed", 1, "a worker died"))
    pieces: list[str] = []
    assert jobs.follow(job_id, pieces.append).state == "failed"
    assert pieces == ["one\n", "two\n"]


@pytest.mark.parametrize("job_id", ["none", "../../etc", "A", ""])
def test_a_job_that_is_not_there_or_cannot_be_is_an_error(jobs: Jobs, job_id: str) -> None:
    with pytest.raises((NotFoundError, UsageError)):
        jobs.find(job_id)
