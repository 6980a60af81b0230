"""What a store and a model may be called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eagleray.errors import UsageError
from eagleray.store.objects import ObjectStore
from eagleray.store.uri import parse_store_uri, validate_key, validate_name

HOSTILE_LOCATIONS = [
    "",
    " ",
    "\n",
    " ./store",
    "./store ",
    "./sto\nre",
    "./sto\x00re",
    "./sto\x1bre",
    "./sto\udcffre",
    "./store?endpoint_override=http://evil",
    "./store#fragment",
    "simplecache::s3://bucket/prefix",
    "zip://x::s3://bucket",
    ".\\store",
    "C:\\store",
    "C:/store",
    "$HOME/store",
    "./%2e%2e/store",
    "./st*re",
    "//host/share",
    "-rf",
    "~root/store",
    "file:///etc/passwd",
    "file:/etc/passwd",
    "http://example.com/store",
    "https://example.com/store",
    "ftp://example.com/store",
    "hdfs://example.com/store",
    "memory://store",
    "az://container/prefix",
    "data:text/plain,hello",
    "javascript:alert(1)",
    "S3://bucket/prefix",
    "s3:/bucket/prefix",
    "s3://",
    "s3:///prefix",
    "s3://b",
    "s3://Bucket/prefix",
    "s3://bucket_name/prefix",
    "s3://-bucket/prefix",
    "s3://bucket-/prefix",
    "s3://127.0.0.1/prefix",
    "s3://bucket:9000/prefix",
    "s3://key:secret@bucket/prefix",
    "s3://user@bucket",
    "s3://bucket?endpoint_override=http://evil",
    "s3://bucket/prefix?region=evil",
    "s3://bucket/../other",
    "s3://bucket/a/./b",
    "s3://bucket/a//b",
    "s3://bucket/.hidden",
    "s3://bucket/a b",
    "s3://bucket/%2e%2e/other",
    "s3://bu..cket/prefix",
    "gs://user@bucket/prefix",
    "s3://" + "b" * 64,
    "x" * 1025,
]

HOSTILE_NAMES = [
    *[
        "",
        " ",
        "-name",
        ".name",
        "_name",
        "Name",
        "na me",
        "na/me",
        "../name",
        "..",
        "name\n",
        "na\x00me",
        "na@me",
    ],
    *["name%2f", "n\u00e4me", "na:me", "na\\me", "a" * 129, "{name}", "name;rm"],
]

HOSTILE_KEYS = [
    *["", "/", "/etc/passwd", "a//b", "a/", "../a", "a/../b", ".", "a/./b", ".hidden", "a/.hidden", "a b", "a\n"],
    *["a\\b", "a#1", "a?b", "a%2e", "a*", "~", "a\x00", "a:b", "a/" + "b" * 256],
]


@pytest.fixture
def no_opening() -> Iterator[None]:
    """Fails the test if a file or a socket is opened meanwhile."""
    is_watching = True

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if is_watching and (event in ("open", "os.mkdir") or event.startswith("socket.")):
            raise AssertionError(f"{event}{arguments}")

    sys.addaudithook(watch)
    yield
    is_watching = False


@pytest.mark.usefixtures("no_opening")
def test_hostile_locations_are_refused_before_anything_is_opened() -> None:
    accepted = []
    for text in HOSTILE_LOCATIONS:
        try:
            accepted.append(ObjectStore.open(text))
        except UsageError as error:
            assert error.exit_code == 2
            assert "secret" not in str(error)
    assert len(HOSTILE_LOCATIONS) == 57
    assert not accepted


@pytest.mark.usefixtures("no_opening")
def test_hostile_names_are_refused() -> None:
    for name in HOSTILE_NAMES:
        with pytest.raises(UsageError, match="is not a model name"):
            validate_name(name)


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_hostile_keys_are_refused(local_store: ObjectStore, key: str) -> None:
    with pytest.raises(UsageError, match="is not a key"):
        local_store.put(key, b"")
    with pytest.raises(UsageError, match="is not a key"):
        validate_key(key)


@pytest.mark.parametrize(
    "text, location",
    [
        ("s3://bucket", "s3://bucket"),
        ("s3://bucket/", "s3://bucket"),
        ("s3://my.bucket-1/a/b_c=d/", "s3://my.bucket-1/a/b_c=d"),
        ("gs://bucket/prefix", "gs://bucket/prefix"),
        ("/data/store", "/data/store"),
    ],
)
def test_locations_have_a_canonical_form(text: str, location: str) -> None:
    assert str(parse_store_uri(text)) == location


def test_a_relative_directory_is_told_from_an_absolute_one() -> None:
    assert parse_store_uri("./store").is_relative
    assert parse_store_uri("./store").path == Path.cwd() / "store"
    assert not parse_store_uri("/store").is_relative
    assert not parse_store_uri("~/store").is_relative


def test_a_good_name_is_returned() -> None:
    assert validate_name("en-fr_2.0") == "en-fr_2.0"
