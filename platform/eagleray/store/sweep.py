"""Removing what no manifest names and no live run owns."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import chain
from pathlib import Path

from eagleray.errors import CheckpointDamagedError, NotFoundError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.leases import LEASE_S, leases_dir
from eagleray.store.manifest import manifest_key, version_dir
from eagleray.store.objects import ObjectInfo, ObjectStore
from eagleray.store.owner import beat_key
from eagleray.store.registry import deletion_key
from eagleray.store.runs import epoch_key, highest_epoch
from eagleray.store.versions import found_versions, parse_version

GRACE_S = 600.0
"""Seconds that files outlive their manifest, and a run its last beat: a reader or a slow owner may be at work."""


@dataclass(frozen=True, slots=True)
class Swept:
    """An object that was removed, or would be.

    Attributes:
        key: Its key.
        size_bytes: Its bytes.
        reason: Why.
    """

    key: str
    size_bytes: int
    reason: str


def sweep(store: ObjectStore, *, grace_s: float = GRACE_S, dry_run: bool = False) -> list[Swept]:
    """Remove what torn saves, deletions and preparations of data left.

    Args:
        store: The store.
        grace_s: Seconds that files outlive their manifest, and a run its last beat.
        dry_run: Only report.

    Returns:
        What was removed, and why. Versions and data with a damaged manifest are left alone.
    """
    swept: list[Swept] = []
    limit = datetime.now(UTC) - timedelta(seconds=grace_s)
    for name in store.children("models"):
        for version in found_versions(store, name):
            swept += _sweep_version(store, name, version, limit, dry_run)
        swept += _sweep_leases(store, name, min(limit, datetime.now(UTC) - timedelta(seconds=LEASE_S)), dry_run)
    for fingerprint in store.children("data"):
        swept += _sweep_data(store, f"data/{fingerprint}", limit, dry_run)
    swept += _sweep_staging(store, limit, dry_run)
    return swept


def _sweep_version(store: ObjectStore, name: str, version: str, limit: datetime, dry_run: bool) -> Iterator[Swept]:
    try:
        named = _named(store, name, version)
    except CheckpointDamagedError:
        return
    deletion = _modified(store, deletion_key(name, version))
    if deletion is not None and not named:
        if deletion > limit:
            return
        reason = "the version was deleted"
    elif _is_owned(store, name, version, limit):
        return
    else:
        reason = "no manifest names it"
    for info in list(store.list(version_dir(name, version))):
        if info.key not in named and (deletion is not None or info.modified <= limit):
            yield _remove(store, info, reason, dry_run)
    if deletion is not None and not dry_run:
        store.delete(deletion_key(name, version))


def _named(store: ObjectStore, name: str, version: str) -> set[str]:
    try:
        checkpoint = Checkpoint.open(store, name, version)
    except NotFoundError:
        return set()
    files = {f"{checkpoint.base}/{entry.path}" for entry in checkpoint.manifest.files}
    return files | {manifest_key(name, version)}


def _is_owned(store: ObjectStore, name: str, version: str, limit: datetime) -> bool:
    """Whether the version's run has an owner that did not end and was heard of lately."""
    run = (parse_version(version) or (0, 0))[0]
    epoch = highest_epoch(store, name, run)
    if epoch is None or store.exists(epoch_key(name, run, epoch, ".end")):
        return False
    times = [_modified(store, key) for key in (beat_key(name, run), epoch_key(name, run, epoch))]
    return any(time is not None and time > limit for time in times)


def _modified(store: ObjectStore, key: str) -> datetime | None:
    folder = key.rsplit("/", 1)[0]
    return next((info.modified for info in store.list(folder) if info.key == key), None)


def _sweep_leases(store: ObjectStore, name: str, limit: datetime, dry_run: bool) -> Iterator[Swept]:
    for info in list(store.list(leases_dir(name))):
        if info.modified <= limit:
            yield _remove(store, info, "the server that held it is gone", dry_run)


def _sweep_data(store: ObjectStore, base: str, limit: datetime, dry_run: bool) -> Iterator[Swept]:
    """Folders of preparations that died, or that were slower than another one of the same data."""
    objects = list(store.list(base))
    named = _named_data(store, f"{base}/manifest.json")
    if named is None:
        return
    for attempt in sorted({info.key.rsplit("/", 1)[0] for info in objects} - {base, *named}):
        files = [info for info in objects if info.key.startswith(f"{attempt}/")]
        # A preparation writes file after file: what counts is when it was heard of last.
        if max(info.modified for info in files) <= limit:
            for info in files:
                yield _remove(store, info, "no manifest of prepared data names it", dry_run)


def _named_data(store: ObjectStore, key: str) -> set[str] | None:
    """The folders that the manifest of prepared data names; None: it cannot be read."""
    try:
        manifest = json.loads(store.get(key))
        files = [*chain(*manifest["splits"].values()), *manifest["processor"].values()]
        return {file["key"].rsplit("/", 1)[0] for file in files}
    except NotFoundError:
        return set()
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def _sweep_staging(store: ObjectStore, limit: datetime, dry_run: bool) -> Iterator[Swept]:
    """Files that a local put left when it was killed: listings do not show them."""
    root = store.local_path("models")
    if root is None:
        return
    for path in sorted(root.parent.rglob("*#*")):
        stat = path.stat()
        modified = datetime.fromtimestamp(stat.st_mtime, UTC)
        if path.is_file() and path.name.rsplit("#", 1)[-1].isdigit() and modified <= limit:
            key = Path(path).relative_to(root.parent).as_posix()
            if not dry_run:
                path.unlink()
            yield Swept(key, stat.st_size, "a write that did not end left it")


def _remove(store: ObjectStore, info: ObjectInfo, reason: str, dry_run: bool) -> Swept:
    if not dry_run:
        store.delete(info.key)
    return Swept(info.key, info.size, reason)
