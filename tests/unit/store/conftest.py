"""Stores for the tests: a directory and an S3 server, with one meaning."""

from __future__ import annotations

import secrets
from pathlib import Path

import pytest

from eagleray.store.objects import ObjectStore


@pytest.fixture
def local_store(tmp_path: Path) -> ObjectStore:
    return ObjectStore.open(str(tmp_path / "store"))


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest) -> ObjectStore:
    if request.param == "local":
        local: ObjectStore = request.getfixturevalue("local_store")
        return local
    bucket: str = request.getfixturevalue("s3_bucket")
    return ObjectStore.open(f"{bucket}/{secrets.token_hex(8)}", timeout_s=20)
