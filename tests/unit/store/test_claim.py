"""One owner at a time."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from versions_made import NAME, commit, config, save

from eagleray.errors import CheckpointDamagedError, FencedError, OwnerAliveError, RunChangedError
from eagleray.hub import hash_checkpoint
from eagleray.store.claim import Finished, RunClaim, claim_run
from eagleray.store.decide import Contents, Outcome
from eagleray.store.objects import ObjectStore
from eagleray.store.owner import Owner, Timing, beat_key
from eagleray.store.records import create_record, read_record, write_record
from eagleray.store.runs import RunHandle, check_fence, epoch_key, highest_epoch, stop_requested

FAST = Timing(beat_s=0.02, watch_s=0.3, poll_s=0.02)


def claim(store: ObjectStore, *, new_run: bool = False, timing: Timing = FAST, **train: object) -> RunClaim:
    claimed = claim_run(store, config(train=train), new_run=new_run, notify=lambda _: None, timing=timing)
    assert isinstance(claimed, RunClaim)
    return claimed


def owner_elsewhere() -> Owner:
    return replace(Owner.this_process(), host="another-host", machine="another-machine")


def dead_process() -> Owner:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return replace(Owner.this_process(), pid=process.pid, started=time.time())


def take_as(store: ObjectStore, owner: Owner, epoch: int = 1) -> None:
    """Make the records of an owner that did not end."""
    record = {"owner": owner.to_record(), "config": config().model_dump(mode="json")}
    if epoch == 1:
        create_record(store, f"runs/{NAME}/r1/run.json", record)
    create_record(store, epoch_key(NAME, 1, epoch), record)
    write_record(store, beat_key(NAME, 1), {"epoch": epoch})


def test_a_first_claim_begins_run_one(store: ObjectStore) -> None:
    with claim(store) as claimed:
        assert (claimed.handle.run, claimed.handle.epoch, claimed.resume) == (1, 1, None)
        record = read_record(store, epoch_key(NAME, 1, 1))
    assert record["owner"]["pid"] == os.getpid()
    assert record["config"]["train"]["max_steps"] == 10
    assert "torch" in record["environment"]


def test_a_second_claim_is_refused_while_the_first_lives(store: ObjectStore) -> None:
    with claim(store), pytest.raises(OwnerAliveError, match=f"process {os.getpid()} of .* is alive"):
        claim(store)


def test_a_new_run_is_refused_too_while_the_old_one_lives(local_store: ObjectStore) -> None:
    with claim(local_store), pytest.raises(OwnerAliveError, match="run r1 of en-fr belongs to process"):
        claim(local_store, new_run=True)


def test_of_two_claims_at_once_one_is_granted(store: ObjectStore) -> None:
    def attempt(_: int) -> RunClaim | None:
        try:
            return claim(store)
        except OwnerAliveError:
            return None

    with ThreadPoolExecutor(4) as pool:
        granted = [claimed for claimed in pool.map(attempt, range(4)) if claimed is not None]
    assert len(granted) == 1
    granted[0].close()


def test_a_run_goes_on_from_its_latest_commit(local_store: ObjectStore) -> None:
    with claim(local_store) as first:
        commit(local_store, 3)
        commit(local_store, 5)
        first.finish(Outcome.INTERRUPTED, {})
    with claim(local_store) as second:
        assert (second.handle.run, second.handle.epoch) == (1, 2)
        assert second.resume is not None and second.resume.manifest.step == 5


def claim_of_rows(store: ObjectStore, path: str, rows: str) -> RunClaim:
    files = config(data={"train": path})
    contents = Contents(rows * 64)
    claimed = claim_run(store, files, hash_contents=lambda: contents, notify=lambda _: None, timing=FAST)
    assert isinstance(claimed, RunClaim)
    return claimed


def test_a_run_goes_on_where_its_rows_lie_elsewhere_and_not_with_other_rows(local_store: ObjectStore) -> None:
    claim_of_rows(local_store, "/here/rows.jsonl", "a").finish(Outcome.INTERRUPTED, {})
    claim_of_rows(local_store, "/there/rows.jsonl", "a").finish(Outcome.INTERRUPTED, {})
    with pytest.raises(RunChangedError, match="data: 'content aaaaaaaaaaaa' -> 'content bbbbbbbbbbbb'"):
        claim_of_rows(local_store, "/there/rows.jsonl", "b")
    assert highest_epoch(local_store, NAME, 1) == 2


def test_a_run_goes_on_where_its_pretrained_model_was_moved_and_not_where_it_was_changed(
    local_store: ObjectStore, tmp_path: Path
) -> None:
    def attempt(directory: Path) -> None:
        files = config(model={"pretrained": str(directory)})
        contents = Contents("a" * 64, hash_checkpoint(directory))
        claimed = claim_run(local_store, files, hash_contents=lambda: contents, notify=lambda _: None, timing=FAST)
        assert isinstance(claimed, RunClaim)
        claimed.finish(Outcome.INTERRUPTED, {})

    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    for name in ("config.json", "tokenizer.json", "model.safetensors", "README.md"):
        (here / name).write_text(name)
    attempt(here)
    here.rename(there)
    (there / "README.md").write_text("is no part of a model")
    attempt(there)
    (there / "tokenizer.json").write_text("another one")
    with pytest.raises(RunChangedError, match=r"model\.pretrained: 'content \w{12}' -> 'content \w{12}'"):
        attempt(there)


def test_a_finished_run_is_reported_also_where_its_rows_are_gone(local_store: ObjectStore) -> None:
    claim(local_store).finish(Outcome.FINISHED, {})

    def gone() -> Contents:
        raise AssertionError("the rows were read")

    assert isinstance(claim_run(local_store, config(), hash_contents=gone, notify=lambda _: None), Finished)


def test_changed_code_is_said_with_both_hashes(local_store: ObjectStore, tmp_path: Path) -> None:
    said: list[str] = []
    code = tmp_path / "code"
    code.mkdir()
    for text in ("WIDTH = 1", "WIDTH = 1", "WIDTH = 2"):
        (code / "mine.py").write_text(text)
        said.clear()
        claimed = claim_run(local_store, config(code=[str(code)]), notify=said.append, timing=FAST)
        assert isinstance(claimed, RunClaim)
        claimed.finish(Outcome.INTERRUPTED, {})
        warnings = [line for line in said if line.startswith("warning: the Python files under `code:` changed")]
        assert len(warnings) == (text == "WIDTH = 2")


def test_a_finished_run_is_reported(local_store: ObjectStore) -> None:
    with claim(local_store) as first:
        ref = commit(local_store, 10)
        first.finish(Outcome.FINISHED, {"bleu": 30.0})
    again = claim_run(local_store, config(), notify=lambda _: None, timing=FAST)
    assert again == Finished(NAME, 1, ref, {"bleu": 30.0})


def test_a_run_that_was_never_finished_goes_on_as_failed(local_store: ObjectStore) -> None:
    claim(local_store).close()
    assert read_record(local_store, epoch_key(NAME, 1, 1, ".end"))["outcome"] == "failed"
    claim(local_store).close()


def test_a_longer_run_says_that_the_schedule_is_stretched(local_store: ObjectStore) -> None:
    with claim(local_store) as first:
        first.finish(Outcome.FINISHED, {})
    said: list[str] = []
    longer = claim_run(local_store, config(train={"max_steps": 20}), notify=said.append, timing=FAST)
    assert isinstance(longer, RunClaim)
    longer.close()
    assert any("train.max_steps was raised from 10 to 20" in line and "stretched" in line for line in said)
    with pytest.raises(RunChangedError, match=r"train\.max_steps: 20 -> 10"):
        claim(local_store)


def test_another_file_is_refused_with_the_keys_and_the_way_out(local_store: ObjectStore) -> None:
    claim(local_store).close()
    with pytest.raises(RunChangedError, match=r"train.learning_rate: 5e-05 -> 0.5") as error:
        claim(local_store, learning_rate=0.5)
    assert "--new-run" in str(error.value) and error.value.exit_code == 2
    with claim(local_store, new_run=True, learning_rate=0.5) as other:
        assert (other.handle.run, other.handle.epoch, other.resume) == (2, 1, None)


def test_a_dead_process_of_this_host_is_followed_at_once(store: ObjectStore) -> None:
    take_as(store, dead_process())
    with claim(store, timing=Timing(watch_s=1000, poll_s=1000)) as claimed:
        assert claimed.handle.epoch == 2


def test_an_owner_elsewhere_without_a_beat_is_followed_after_the_watch(local_store: ObjectStore) -> None:
    take_as(local_store, owner_elsewhere())
    said: list[str] = []
    claimed = claim_run(local_store, config(), notify=said.append, timing=FAST)
    assert isinstance(claimed, RunClaim)
    with claimed:
        assert claimed.handle.epoch == 2
    assert any("on another-host; watching" in line for line in said)


def test_an_owner_elsewhere_that_beats_is_left_alone(local_store: ObjectStore) -> None:
    take_as(local_store, owner_elsewhere())
    handle = RunHandle(local_store, NAME, 1, 1, "a")
    owner = RunClaim(handle, None, timing=FAST, notify=lambda _: None)
    try:
        with pytest.raises(OwnerAliveError, match="on another-host, which is alive"):
            claim(local_store)
    finally:
        owner.close()


def test_beats_of_an_owner_that_was_taken_over_do_not_count(local_store: ObjectStore) -> None:
    take_as(local_store, owner_elsewhere())
    take_as(local_store, owner_elsewhere(), epoch=2)
    write_record(local_store, beat_key(NAME, 1), {"epoch": 1})
    with claim(local_store) as claimed:
        assert claimed.handle.epoch == 3


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_an_owner_that_was_taken_over_knows_it_and_stops_beating(local_store: ObjectStore) -> None:
    with claim(local_store) as old:
        take_as(local_store, owner_elsewhere(), epoch=2)
        wait_until(lambda: old.is_fenced)
        beat = read_record(local_store, beat_key(NAME, 1))
        time.sleep(5 * FAST.beat_s)
        assert read_record(local_store, beat_key(NAME, 1)) == beat


def test_an_owner_that_was_taken_over_cannot_commit(local_store: ObjectStore) -> None:
    commit(local_store, 3)
    take_as(local_store, owner_elsewhere(), epoch=2)
    with pytest.raises(FencedError, match=r"taken over by process \d+ on another-host"):
        save(local_store, 4)
    assert not local_store.exists(f"models/{NAME}/r1-step-00000004/manifest.json")


def test_a_new_run_fences_the_old_one(local_store: ObjectStore) -> None:
    take_as(local_store, dead_process())
    revenant = RunHandle(local_store, NAME, 1, 1, "a")
    check_fence(revenant)
    with claim(local_store, new_run=True) as new:
        assert new.handle.run == 2
    with pytest.raises(FencedError):
        check_fence(revenant)


def test_a_run_that_nobody_took_after_its_record_is_taken(local_store: ObjectStore) -> None:
    create_record(local_store, f"runs/{NAME}/r1/run.json", {"config": config().model_dump(mode="json")})
    with claim(local_store) as claimed:
        assert (claimed.handle.run, claimed.handle.epoch) == (1, 1)


def test_a_damaged_checkpoint_to_go_on_from_is_refused_and_the_run_given_up(local_store: ObjectStore) -> None:
    claim(local_store).close()
    commit(local_store, 3)
    key = f"models/{NAME}/r1-step-00000003/manifest.json"
    local_store.put(key, local_store.get(key).replace(b'"step":3', b'"step":4'))
    with pytest.raises(CheckpointDamagedError, match=key):
        claim(local_store)
    assert local_store.exists(epoch_key(NAME, 1, highest_epoch(local_store, NAME, 1) or 0, ".end"))


def test_a_stop_reaches_the_workers_of_this_owner_and_not_of_the_next(store: ObjectStore) -> None:
    with claim(store) as first:
        worker = pickle.loads(pickle.dumps(first.handle))
        assert not stop_requested(worker)
        first.request_stop()
        assert stop_requested(worker)
    with claim(store) as second:
        assert not stop_requested(second.handle)
