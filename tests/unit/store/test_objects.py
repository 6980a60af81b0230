"""A directory and S3 behave alike."""

from __future__ import annotations

import pickle
import secrets
import socket
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eagleray.errors import AlreadyExistsError, NotFoundError, StoreError
from eagleray.store.credentials import aws_options, redact
from eagleray.store.objects import ObjectStore

MIB = 1024 * 1024


def test_what_is_put_is_read_whole_and_by_range(store: ObjectStore) -> None:
    store.put("a/b.bin", b"0123456789")
    assert store.get("a/b.bin") == b"0123456789"
    assert store.get_range("a/b.bin", 2, 5) == b"234"
    assert store.get_range("a/b.bin", 8, 20) == b"89"
    assert store.get_range("a/b.bin", 10, 12) == store.get_range("a/b.bin", 50, 60) == b""
    assert store.get_range("a/b.bin", 5, 5) == b""
    assert store.size("a/b.bin") == 10


def test_put_replaces_and_create_does_not(store: ObjectStore) -> None:
    store.put("key", b"one")
    store.put("key", b"two")
    with pytest.raises(AlreadyExistsError, match="key exists already"):
        store.put("key", b"three", create=True)
    assert store.get("key") == b"two"


@pytest.mark.parametrize("num_bytes", [0, 1000, 12 * MIB])
@pytest.mark.parametrize("create", [False, True])
def test_pieces_are_written_as_they_come(store: ObjectStore, num_bytes: int, create: bool) -> None:
    data = secrets.token_bytes(num_bytes)
    store.put("key", (memoryview(data)[i : i + MIB] for i in range(0, num_bytes, MIB)), create=create)
    assert store.get("key") == data


@pytest.mark.parametrize("num_pieces", [1, 8])
def test_a_failing_source_leaves_nothing(store: ObjectStore, num_pieces: int) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(num_pieces):
            yield bytes(MIB)
        raise OSError("the source failed")

    with pytest.raises(StoreError):
        store.put("key", pieces())
    assert list(store.list()) == []
    assert not store.exists("key")


def test_of_many_that_create_one_object_exactly_one_succeeds(store: ObjectStore) -> None:
    def create(number: int) -> bool:
        try:
            store.put("lock", str(number).encode(), create=True)
        except AlreadyExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(create, range(8)))
    assert outcomes.count(True) == 1
    assert store.get("lock") == str(outcomes.index(True)).encode()


def test_a_repeated_request_finds_its_own_object(store: ObjectStore) -> None:
    store.put_unique("key", b"nonce 1")
    store.put_unique("key", b"nonce 1")
    with pytest.raises(AlreadyExistsError):
        store.put_unique("key", b"nonce 2")


def test_listings_are_sorted_and_end_at_a_segment(store: ObjectStore) -> None:
    for key in ("m/b/2", "m/a/1", "m/a/0", "mm/c"):
        store.put(key, b"xy")
    assert [(info.key, info.size) for info in store.list("m")] == [("m/a/0", 2), ("m/a/1", 2), ("m/b/2", 2)]
    assert next(store.list("m/a")).modified.tzinfo is not None
    assert store.children("m") == ("a", "b")
    assert store.children() == ("m", "mm")
    assert (list(store.list("none")), store.children("none")) == ([], ())


def test_a_missing_object_is_not_found_and_removed_already(store: ObjectStore) -> None:
    for read in (store.get, store.size, lambda key: store.get_range(key, 0, 1)):
        with pytest.raises(NotFoundError, match="there is no missing"):
            read("missing")
    store.delete("missing")
    store.put("key", b"")
    store.delete("key")
    assert not store.exists("key")


def test_a_deleted_folder_is_gone_from_the_listing(store: ObjectStore) -> None:
    store.put("a/b/c", b"")
    store.delete("a/b/c")
    assert store.children() == ()


def test_a_store_pickles_without_credentials(store: ObjectStore) -> None:
    store.put("key", b"data")
    data = pickle.dumps(store)
    assert b"a-secret-key" not in data and b"an-access-key" not in data
    again = pickle.loads(data)
    assert (again.location, again.is_local, again.get("key")) == (store.location, store.is_local, b"data")
    assert repr(store) == f"ObjectStore({store.location!r})"


def test_only_a_directory_has_local_paths(store: ObjectStore) -> None:
    store.put("a/b", b"data")
    path = store.local_path("a/b")
    assert (path is not None) == store.is_local
    assert path is None or path.read_bytes() == b"data"


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match=r"/file is a file, and a store is a directory"):
        ObjectStore.open(str(tmp_path / "file"))


def test_files_and_folders_are_synced_before_put_returns(local_store: ObjectStore) -> None:
    """fsync is seen through the file descriptors that the interpreter opens for it."""
    opened: list[str] = []
    is_watching = True

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if is_watching and event == "open":
            opened.append(str(arguments[0]))

    sys.addaudithook(watch)
    local_store.put("new/folder/key", b"data")
    is_watching = False
    root = local_store.location
    assert opened[0].startswith(f"{root}/new/folder/key#")
    assert set(opened[1:]) >= {f"{root}/new/folder", f"{root}/new", root}


def test_a_bucket_that_does_not_exist_is_a_clear_error(s3_bucket: str) -> None:
    store = ObjectStore.open("s3://no-such-bucket", timeout_s=5)
    with pytest.raises(StoreError, match="NoSuchBucket") as error:
        store.put("key", b"")
    assert not isinstance(error.value, NotFoundError)
    assert "a-secret-key" not in str(error.value) and "an-access-key" not in str(error.value)


@pytest.fixture
def silent_endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(16)
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
        yield "s3://bucket"


def test_a_store_that_stalls_fails_within_its_time(silent_endpoint: str) -> None:
    store = ObjectStore.open(silent_endpoint, timeout_s=1)
    outcome: list[BaseException] = []

    def put() -> None:
        try:
            store.put("key", b"data")
        except StoreError as error:
            outcome.append(error)

    thread = threading.Thread(target=put, daemon=True)
    thread.start()
    thread.join(20)
    assert outcome and "cannot write key in the store s3://bucket" in str(outcome[0])


def test_a_store_that_refuses_connections_is_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{taken.getsockname()[1]}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
        with pytest.raises(StoreError, match="cannot read key in the store s3://bucket"):
            ObjectStore.open("s3://bucket", timeout_s=1).get("key")


def test_credentials_come_from_the_files_where_the_environment_has_none(tmp_path: Path) -> None:
    (tmp_path / "credentials").write_text(
        "[default]\naws_access_key_id = AKIDEFAULT\naws_secret_access_key = s%ecret\n"
        "[other]\naws_access_key_id = AKIOTHER\naws_secret_access_key = other\n"
    )
    (tmp_path / "config").write_text("[default]\nregion = eu-west-3\n[profile other]\nregion = eu-west-1\n")
    files = {
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "credentials"),
        "AWS_CONFIG_FILE": str(tmp_path / "config"),
    }
    default = {"access_key_id": "AKIDEFAULT", "secret_access_key": "s%ecret", "region": "eu-west-3"}
    other = {"access_key_id": "AKIOTHER", "secret_access_key": "other", "region": "eu-west-1"}
    assert aws_options(files) == default
    assert aws_options({**files, "AWS_PROFILE": "other"}) == other
    assert aws_options({**files, "AWS_ACCESS_KEY_ID": "x", "AWS_REGION": "y"}) == {}
    assert redact("AKIDEFAULT and s%ecret and AKIOTHER", files) == "*** and *** and AKIOTHER"


def test_a_directory_that_cannot_be_made_is_a_clear_error() -> None:
    with pytest.raises(StoreError, match="cannot open the store /proc/store"):
        ObjectStore.open("/proc/store")
