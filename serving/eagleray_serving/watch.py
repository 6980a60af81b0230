"""What a followed reference stands for, asked again and again: few requests to the store."""

from __future__ import annotations

from eagleray.errors import CheckpointDamagedError, NotFoundError
from eagleray.store.manifest import manifest_key
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry, VersionInfo, best_version, describe
from eagleray.store.versions import found_versions, read_manifest


class Watch:
    """A reference that moves.

    A look at `latest` or at an alias takes two or three requests. One at `best` reads each manifest once, since a
    manifest never changes, and then takes two.

    Args:
        store: The store.
        name: The model's name.
        follow: `latest`, `best`, an alias, or any other selector of a reference.
    """

    def __init__(self, store: ObjectStore, name: str, follow: str) -> None:
        self._store = store
        self._name = name
        self._follow = follow.removeprefix("@")
        self._known: dict[str, VersionInfo] = {}

    def look(self) -> str:
        """Return the version that it stands for now.

        Raises:
            NotFoundError: It stands for nothing.
            StoreError: The store does not answer.
        """
        best = self._best() if self._follow == "best" else None
        if best is not None:
            return best
        selector = "latest" if self._follow == "best" else self._follow
        return Registry(self._store).resolve(f"{self._name}@{selector}").partition("@")[2]

    def _best(self) -> str | None:
        found = found_versions(self._store, self._name)
        known = {version: self._known.get(version) or self._describe(version) for version in found}
        self._known = {version: info for version, info in known.items() if info is not None}
        while best := best_version(list(self._known.values())):
            if self._store.exists(manifest_key(self._name, best.version)):
                return best.version
            del self._known[best.version]  # deleted; its files are not swept yet
        return None

    def _describe(self, version: str) -> VersionInfo | None:
        try:
            return describe(read_manifest(self._store, self._name, version))
        except (NotFoundError, CheckpointDamagedError):
            return None  # not committed yet, or never to be served
