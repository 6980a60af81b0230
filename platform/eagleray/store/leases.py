"""Versions that a server holds: retention leaves them alone, so that a replica can be started again."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from eagleray.errors import NotFoundError
from eagleray.store.objects import ObjectStore
from eagleray.store.records import read_record, write_record
from eagleray.store.uri import validate_name

RENEW_S = 120.0
"""Seconds after which a server renews its lease."""

LEASE_S = 900.0
"""Seconds after which a lease that was not renewed counts no more."""


def write_lease(store: ObjectStore, name: str, holder: str, versions: Sequence[str]) -> None:
    """Say that a server holds versions of a model; to be said again every `RENEW_S` seconds."""
    write_record(store, _key(name, holder), {"versions": list(versions)})


def remove_lease(store: ObjectStore, name: str, holder: str) -> None:
    """Say that a server holds nothing any more."""
    store.delete(_key(name, holder))


def leased_versions(store: ObjectStore, name: str) -> set[str]:
    """Return the versions of a model that servers hold."""
    limit = datetime.now(UTC) - timedelta(seconds=LEASE_S)
    held: set[str] = set()
    for info in store.list(leases_dir(name)):
        if info.modified < limit:
            continue
        try:
            held.update(map(str, read_record(store, info.key).get("versions", ())))
        except NotFoundError:
            continue  # the server ended since the list was read
    return held


def leases_dir(name: str) -> str:
    """The prefix of a model's leases."""
    return f"models/{validate_name(name)}/leases"


def _key(name: str, holder: str) -> str:
    return f"{leases_dir(name)}/{validate_name(holder)}.json"
