"""Small JSON records in the store."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from eagleray.errors import StoreError
from eagleray.store.manifest import canonical_json
from eagleray.store.objects import ObjectStore


def now_text() -> str:
    """The time as records spell it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def encode_record(values: Mapping[str, Any]) -> bytes:
    """A record with its time and a nonce, so that no two are alike."""
    return canonical_json({"created": now_text(), "nonce": secrets.token_hex(8), **values})


def write_record(store: ObjectStore, key: str, values: Mapping[str, Any]) -> None:
    """Write a record, over another one if there is."""
    store.put(key, encode_record(values))


def create_record(store: ObjectStore, key: str, values: Mapping[str, Any]) -> None:
    """Write a record that must be the first under its key.

    Raises:
        AlreadyExistsError: Somebody was faster.
    """
    store.put_unique(key, encode_record(values))


def read_record(store: ObjectStore, key: str) -> dict[str, Any]:
    """Read a record.

    Raises:
        NotFoundError: There is none.
        StoreError: It is not a JSON object.
    """
    data = store.get(key)
    try:
        record = json.loads(data)
    except ValueError:
        record = None
    if not isinstance(record, dict):
        raise StoreError(f"{key} in the store {store.location} is not a record", hint="Restore or remove it.")
    return record
