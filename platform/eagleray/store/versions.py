"""Which versions of a name are committed."""

from __future__ import annotations

import re

from eagleray.errors import CheckpointDamagedError, NotFoundError
from eagleray.store.manifest import Manifest, manifest_key, parse_manifest, version_name
from eagleray.store.objects import ObjectStore

VERSION = re.compile(r"r([1-9]\d*)-step-(\d{8,})")


def parse_version(text: str) -> tuple[int, int] | None:
    """The run and the step of `r2-step-00001200`; None: it is no version's name."""
    match = VERSION.fullmatch(text)
    if match is None:
        return None
    run, step = int(match[1]), int(match[2])
    return (run, step) if version_name(run, step) == text else None


def found_versions(store: ObjectStore, name: str) -> list[str]:
    """Versions that have objects in the store, committed or not, in the order of their runs and steps."""
    found = [(parse_version(child), child) for child in store.children(f"models/{name}")]
    return [child for key, child in sorted((key, child) for key, child in found if key is not None)]


def latest_version(store: ObjectStore, name: str, run: int | None = None) -> str | None:
    """The newest committed version: the last step of the last run, or of the run that is asked for."""
    for version in reversed(found_versions(store, name)):
        is_wanted = run is None or version.startswith(f"r{run}-")
        if is_wanted and store.exists(manifest_key(name, version)):
            return version
    return None


def read_manifest(store: ObjectStore, name: str, version: str) -> Manifest:
    """Read what a version consists of.

    Raises:
        NotFoundError: It was never committed, or was deleted.
        CheckpointDamagedError: Its manifest was changed.
    """
    key = manifest_key(name, version)
    try:
        data = store.get(key)
    except NotFoundError:
        raise NotFoundError(f"there is no version {version} of {name} in the store {store.location}") from None
    manifest = parse_manifest(data, key)
    if (manifest.name, manifest.version) != (name, version):
        raise CheckpointDamagedError(
            f"{key} is the manifest of {manifest.name}@{manifest.version}",
            hint="Use another version, or restore the file.",
        )
    return manifest
