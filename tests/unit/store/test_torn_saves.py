"""Whatever happens to a save, the store holds whole versions only, and the save can be made again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from faulty import Countdown, FaultyStore, FullStore
from versions_made import NAME, commit, save, tensors

from eagleray.errors import CheckpointDamagedError, EaglerayError, NotFoundError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.store.sweep import sweep

FIRST, SECOND = "r1-step-00000001", "r1-step-00000002"


def read_everything(store: ObjectStore, version: str) -> None:
    """Use a version in every way; whatever is wrong raises."""
    checkpoint = Checkpoint.open(store, NAME, version)
    checkpoint.config()
    checkpoint.state()
    checkpoint.files()
    read = checkpoint.tensors(prefix="")
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors().items())


def assert_only_whole_versions(store: ObjectStore) -> bool:
    """The first version is whole; the second is whole or was never committed. Returns whether it was."""
    read_everything(store, FIRST)
    versions = [info.version for info in Registry(store).versions(NAME)]
    assert versions in ([FIRST], [FIRST, SECOND])
    if versions[-1] == SECOND:
        read_everything(store, SECOND)
    return versions[-1] == SECOND


def assert_can_be_repeated(store: ObjectStore) -> None:
    commit(store, 2, bleu=2.0)
    read_everything(store, SECOND)
    sweep(store, grace_s=-5)
    assert not any(Checkpoint.open(store, NAME, version).verify() for version in (FIRST, SECOND))


def kill_saves(folder: Path, stride: int) -> None:
    commit(ObjectStore.open(str(folder / "seed")), 1, bleu=1.0)
    program = Path(__file__).with_name("killed_saves.py")
    command = [sys.executable, str(program), str(folder), "400", str(stride)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(program.parent), *sys.path])}
    children = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert children.stdout is not None
    num_killed = num_committed = 0
    try:
        for line in children.stdout:
            number, outcome = line.split(maxsplit=1)
            store = ObjectStore.open(str(folder / number))
            num_committed += assert_only_whole_versions(store)
            assert_can_be_repeated(store)
            if outcome.strip() == "ended":
                break
            assert outcome.strip() == "killed"
            num_killed += 1
    finally:
        children.kill()
        children.wait()
        children.stdout.close()
    # A save is that many actions; the last ones come after the commit.
    assert num_killed >= 30 // stride
    assert 0 < num_committed < num_killed


@pytest.mark.slow
def test_a_save_killed_at_any_action_leaves_whole_versions(tmp_path: Path) -> None:
    kill_saves(tmp_path, stride=1)


def test_a_save_killed_at_some_action_leaves_whole_versions(tmp_path: Path) -> None:
    kill_saves(tmp_path, stride=5)


def test_a_save_refused_at_any_operation_leaves_whole_versions(tmp_path: Path) -> None:
    count = Countdown()
    seed = ObjectStore.open(str(tmp_path / "count"))
    commit(seed, 1, bleu=1.0)
    commit(FaultyStore(seed.location, count), 2, bleu=2.0)
    assert count.num_operations >= 15
    for fail_at in range(count.num_operations):
        store = ObjectStore.open(str(tmp_path / str(fail_at)))
        commit(store, 1, bleu=1.0)
        result = save(FaultyStore(store.location, Countdown(fail_at)), 2, bleu=2.0)
        is_committed = assert_only_whole_versions(store)
        assert is_committed or (result.ref is None and "refused" in (result.error or ""))
        assert_can_be_repeated(store)


@pytest.mark.parametrize("num_bytes", [0, 10, 100, 300, 1000, 3000])
def test_a_full_disk_fails_the_save_and_no_more(tmp_path: Path, num_bytes: int) -> None:
    store = ObjectStore.open(str(tmp_path))
    commit(store, 1, bleu=1.0)
    result = save(FullStore(store.location, num_bytes), 2, bleu=2.0)
    assert result.ref is None and "No space left on device" in (result.error or "")
    assert not assert_only_whole_versions(store)
    assert_can_be_repeated(store)


def test_a_file_system_that_is_full_fails_the_save_and_no_more(tmp_path: Path) -> None:
    mount = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tmp_path)], capture_output=True, timeout=30
    )
    if mount.returncode != 0:
        pytest.skip("no file system may be mounted here")
    try:
        store = ObjectStore.open(str(tmp_path))
        commit(store, 1, bleu=1.0)
        ballast = tmp_path / "ballast"
        with pytest.raises(OSError, match="No space left"), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(512))
        result = save(store, 2, bleu=2.0)
        assert result.ref is None and "No space left on device" in (result.error or "")
        assert not assert_only_whole_versions(store)
        ballast.unlink()
        assert_can_be_repeated(store)
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True, timeout=30)


def refused(store: ObjectStore, version: str, key: str) -> bool:
    """Whether using the version raises an error that names the file."""
    try:
        read_everything(store, version)
    except (CheckpointDamagedError, NotFoundError) as error:
        return key in str(error) or (key.endswith("manifest.json") and version in str(error))
    return False


def truncate_everywhere(store: ObjectStore, stride: int) -> tuple[int, int]:
    """Cut each file of a version at each length; how often that was tried, and how often it was not refused."""
    num_tried = num_accepted = 0
    for info in list(store.list(f"models/{NAME}/{FIRST}")):
        path = store.local_path(info.key)
        assert path is not None
        whole = path.read_bytes()
        for length in range(0, len(whole), stride):
            path.write_bytes(whole[:length])
            num_tried += 1
            num_accepted += not refused(store, FIRST, info.key)
        path.write_bytes(whole)
    read_everything(store, FIRST)
    return num_tried, num_accepted


def flip_everywhere(store: ObjectStore, stride: int) -> tuple[int, int]:
    """Flip one bit in each byte of each file of a version."""
    num_tried = num_accepted = 0
    for info in list(store.list(f"models/{NAME}/{FIRST}")):
        path = store.local_path(info.key)
        assert path is not None
        whole = path.read_bytes()
        header = int.from_bytes(whole[:8], "little") + 8 if info.key.endswith(".safetensors") else 0
        # The header of a safetensors file is not read: the manifest has the ranges. `verify` sees it.
        for position in range(header, len(whole), stride):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << (position % 8)
            path.write_bytes(flipped)
            num_tried += 1
            num_accepted += not refused(store, FIRST, info.key)
        path.write_bytes(whole)
    return num_tried, num_accepted


@pytest.mark.slow
def test_no_truncation_and_no_flipped_bit_is_accepted(local_store: ObjectStore) -> None:
    commit(local_store, 1, bleu=1.0)
    size = sum(info.size for info in local_store.list(f"models/{NAME}/{FIRST}"))
    assert truncate_everywhere(local_store, stride=1) == (size, 0)
    num_flipped, num_accepted = flip_everywhere(local_store, stride=1)
    assert num_flipped > 3000 and num_accepted == 0


def test_a_sample_of_truncations_and_flipped_bits_is_refused(local_store: ObjectStore) -> None:
    commit(local_store, 1, bleu=1.0)
    num_cut, num_accepted = truncate_everywhere(local_store, stride=59)
    assert num_cut > 50 and num_accepted == 0
    num_flipped, num_accepted = flip_everywhere(local_store, stride=53)
    assert num_flipped > 50 and num_accepted == 0


def test_a_missing_file_is_refused_by_name(local_store: ObjectStore) -> None:
    commit(local_store, 1, bleu=1.0)
    keys = [info.key for info in local_store.list(f"models/{NAME}/{FIRST}")]
    assert len(keys) == 6
    for key in keys:
        data = local_store.get(key)
        local_store.delete(key)
        with pytest.raises(EaglerayError, match=r"missing|there is no version") as error:
            read_everything(local_store, FIRST)
        assert key in str(error.value) or FIRST in str(error.value)
        local_store.put(key, data)
    read_everything(local_store, FIRST)
