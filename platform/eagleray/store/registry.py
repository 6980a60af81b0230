"""The models of a store: references, versions, aliases, deletion and retention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eagleray.errors import CheckpointDamagedError, EaglerayError, NotFoundError, UsageError
from eagleray.store.aliases import (
    AliasRecord,
    append_alias,
    previous_record,
    read_alias,
    read_aliases,
    read_history,
    validate_alias,
)
from eagleray.store.leases import leased_versions
from eagleray.store.manifest import Manifest, manifest_key, version_name
from eagleray.store.objects import ObjectStore
from eagleray.store.records import write_record
from eagleray.store.uri import validate_name
from eagleray.store.versions import found_versions, latest_version, parse_version, read_manifest

if TYPE_CHECKING:
    from eagleray.store.checkpoint import Checkpoint

_STEP = re.compile(r"step-(\d{1,12})")


@dataclass(frozen=True, slots=True)
class VersionInfo:
    """A committed version in a list.

    Attributes:
        name: The model's name.
        version: `r2-step-00001200`.
        run: Its run.
        step: Its step.
        created: When it was committed; empty where the manifest is damaged.
        metrics: Its scores.
        best_metric: The score that its run goes by, and whether greater is better.
        aliases: That stand for it now.
        size_bytes: Of all its files.
        manifest_sha256: Hash of its manifest.
        problem: Why it cannot be opened; None: nothing is known against it.
    """

    name: str
    version: str
    run: int
    step: int
    created: str = ""
    metrics: dict[str, float | None] = field(default_factory=dict)
    best_metric: tuple[str, bool] | None = None
    aliases: tuple[str, ...] = ()
    size_bytes: int = 0
    manifest_sha256: str = ""
    problem: str | None = None

    @property
    def ref(self) -> str:
        """`en-fr@r2-step-00001200`."""
        return f"{self.name}@{self.version}"


class Registry:
    """The models of a store.

    A reference is `<name>@<version>`, `<name>@step-<n>` (of the newest run), `<name>@latest`, `<name>@best` or
    `<name>@<alias>`; `<name>` alone is the best version, or the latest where no evaluation ran.
    """

    def __init__(self, store: ObjectStore) -> None:
        self.store = store

    def open(self, ref: str) -> Checkpoint:
        """Open what a reference stands for.

        Raises:
            UsageError: It is no reference.
            NotFoundError: It stands for nothing.
            CheckpointDamagedError: The manifest was changed, or is not the one that the alias was set to.
        """
        # Not at the top: whoever only looks at references and manifests does without torch.
        from eagleray.store.checkpoint import Checkpoint

        return Checkpoint(self.store, self.manifest(ref))

    def manifest(self, ref: str) -> Manifest:
        """Read the manifest of what a reference stands for.

        Raises:
            UsageError: It is no reference.
            NotFoundError: It stands for nothing.
            CheckpointDamagedError: The manifest was changed, or is not the one that the alias was set to.
        """
        name, version, alias = self._resolve(ref)
        manifest = read_manifest(self.store, name, version)
        if alias is not None and manifest.sha256 != alias.manifest_sha256:
            raise CheckpointDamagedError(
                f"{manifest_key(name, version)} is not the manifest that {ref} was set to on {alias.created}: its "
                f"hash is {manifest.sha256}, not {alias.manifest_sha256}",
                hint="Check who changed it; set the alias again to accept it.",
            )
        return manifest

    def resolve(self, ref: str) -> str:
        """The full form of a reference: `en-fr@r2-step-00001200`.

        Raises:
            UsageError: It is no reference.
            NotFoundError: It stands for nothing.
        """
        name, version, _ = self._resolve(ref)
        return f"{name}@{version}"

    def names(self) -> list[str]:
        """Names that have at least one committed version."""
        return [name for name in self.store.children("models") if latest_version(self.store, name) is not None]

    def versions(self, name: str) -> list[VersionInfo]:
        """The committed versions of a name, newest last."""
        aliases = read_aliases(self.store, validate_name(name))
        infos = [self._info(name, version, aliases) for version in found_versions(self.store, name)]
        return [info for info in infos if info is not None]

    def best(self, name: str) -> VersionInfo | None:
        """The best version by the score of the newest run that has one; None: no evaluation ran."""
        return best_version(self.versions(name))

    def set_alias(self, name: str, alias: str, ref: str, note: str = "") -> AliasRecord:
        """Let an alias stand for what a reference stands for now.

        Raises:
            UsageError: The alias is not one.
            NotFoundError: The reference stands for nothing.
        """
        validate_alias(alias)
        manifest = self.manifest(ref if "@" in ref else f"{name}@{ref}")
        if manifest.name != name:
            raise UsageError(f"{ref} is not a version of {name}")
        before = read_alias(self.store, name, alias)
        record = append_alias(self.store, name, alias, manifest.version, manifest.sha256, note)
        # Retention may have deleted the version between the look and the record; from here on it sees the alias.
        if not self.store.exists(manifest_key(name, manifest.version)):
            version, sha256 = (before.version, before.manifest_sha256) if before else (None, None)
            append_alias(self.store, name, alias, version, sha256, f"{manifest.version} was deleted meanwhile")
            raise self._not_found(name, f"version {manifest.version}")
        return record

    def remove_alias(self, name: str, alias: str, note: str = "") -> None:
        """Let an alias stand for nothing; its history stays.

        Raises:
            NotFoundError: It stands for nothing.
        """
        self._alias(name, alias)
        append_alias(self.store, name, alias, None, None, note)

    def alias_history(self, name: str, alias: str) -> list[AliasRecord]:
        """Every record of an alias, oldest first."""
        return read_history(self.store, validate_name(name), validate_alias(alias))

    def rollback(self, name: str, alias: str, note: str = "") -> AliasRecord:
        """Set an alias back to the version it stood for before this one.

        Raises:
            NotFoundError: There was none, or it was deleted.
        """
        previous = previous_record(self.alias_history(name, alias))
        assert previous.version is not None
        return self.set_alias(name, alias, f"{name}@{previous.version}", note or "rollback")

    def delete(self, ref: str) -> None:
        """Delete a version: its manifest now, its files when nobody can be reading them any more (`sweep`).

        Raises:
            NotFoundError: The reference stands for nothing.
            UsageError: An alias stands for the version.
        """
        name, version, _ = self._resolve(ref)
        aliases = [alias for alias, record in read_aliases(self.store, name).items() if record.version == version]
        if aliases:
            raise UsageError(
                f"{name}@{version} has the alias {', '.join(aliases)}",
                hint="Set the alias to another version first.",
            )
        # The record comes first: a deletion that dies in between is seen by the sweep, and can be made again.
        write_record(self.store, deletion_key(name, version), {"version": version})
        self.store.delete(manifest_key(name, version))

    def apply_retention(
        self, name: str, limit: int, *, metric: str | None = None, greater_is_better: bool | None = None
    ) -> list[str]:
        """Delete all but the newest versions; never the best one, one that has an alias or one that is served.

        Args:
            name: The model's name.
            limit: How many of the newest versions stay.
            metric: The score that `best` goes by; None: the one that the manifests name.
            greater_is_better: Its direction.

        Returns:
            References of the deleted versions.
        """
        by = None if metric is None else (metric, bool(greater_is_better))
        deleted = []
        expendable = expendable_versions(self.versions(name), limit, by)
        served = leased_versions(self.store, name) if expendable else set()
        for info in expendable:
            if info.version in served:
                continue
            try:
                self.delete(info.ref)
            except UsageError:
                # An alias was set since the list was read.
                continue
            deleted.append(info.ref)
        return deleted

    def _resolve(self, ref: str) -> tuple[str, str, AliasRecord | None]:
        """The name, the version and, if it was one, the alias of a reference."""
        name, separator, selector = ref.partition("@")
        validate_name(name)
        if separator and not selector:
            raise UsageError(f"{ascii(ref)[:120]} is not a reference", hint="Write NAME or NAME@VERSION.")
        if parse_version(selector) is not None:
            return name, self._existing(name, selector), None
        if step := _STEP.fullmatch(selector):
            return name, self._step(name, int(step[1])), None
        if selector in ("", "best", "latest"):
            return name, self._best_or_latest(name, selector), None
        record = self._alias(name, selector)
        assert record.version is not None
        return name, record.version, record

    def _existing(self, name: str, version: str) -> str:
        if not self.store.exists(manifest_key(name, version)):
            raise self._not_found(name, f"version {version}")
        return version

    def _step(self, name: str, step: int) -> str:
        latest = latest_version(self.store, name)
        run = parse_version(latest) if latest is not None else None
        if run is None:
            raise self._not_found(name, f"version of step {step}")
        return self._existing(name, version_name(run[0], step))

    def _best_or_latest(self, name: str, selector: str) -> str:
        best = self.best(name) if selector != "latest" else None
        if best is not None:
            return best.version
        latest = latest_version(self.store, name) if selector != "best" else None
        if latest is None:
            raise self._not_found(name, "version with a score" if selector == "best" else "committed version")
        return latest

    def _alias(self, name: str, alias: str) -> AliasRecord:
        record = read_alias(self.store, name, validate_alias(alias))
        if record is None:
            raise self._not_found(name, f"alias {alias}")
        return record

    def _not_found(self, name: str, what: str) -> NotFoundError:
        versions = [info.version for info in self.versions(name)][-5:]
        known = ", ".join(self.names()[:10]) or "none"
        return NotFoundError(
            f"{name} has no {what} in the store {self.store.location}",
            hint=f"Its newest versions: {', '.join(versions)}." if versions else f"Models there: {known}.",
        )

    def _info(self, name: str, version: str, aliases: dict[str, AliasRecord]) -> VersionInfo | None:
        run, step = parse_version(version) or (0, 0)
        named = tuple(alias for alias, record in aliases.items() if record.version == version)
        try:
            return describe(read_manifest(self.store, name, version), named)
        except NotFoundError:
            return None
        except CheckpointDamagedError as error:
            return VersionInfo(name, version, run, step, aliases=named, problem=error.message)


def deletion_key(name: str, version: str) -> str:
    """The key of the record that says since when a version is deleted."""
    return f"models/{name}/deleted/{version}.json"


def describe(manifest: Manifest, aliases: tuple[str, ...] = ()) -> VersionInfo:
    """A manifest as a list shows it."""
    return VersionInfo(
        name=manifest.name,
        version=manifest.version,
        run=manifest.run,
        step=manifest.step,
        created=manifest.created,
        metrics=manifest.metrics,
        best_metric=manifest.best_metric,
        aliases=aliases,
        size_bytes=manifest.size_bytes,
        manifest_sha256=manifest.sha256,
    )


def best_version(versions: Sequence[VersionInfo], by: tuple[str, bool] | None = None) -> VersionInfo | None:
    """The version with the best score; of equal ones the newest; None: none has the score.

    Args:
        versions: Newest last.
        by: The score and whether greater is better; None: those of the newest version that has its own.
    """
    scored = [info for info in versions if info.best_metric and info.metrics.get(info.best_metric[0]) is not None]
    by = by or (scored[-1].best_metric if scored else None)
    if by is None:
        return None
    metric, greater_is_better = by
    best: VersionInfo | None = None
    best_score = 0.0
    for info in versions:
        score = info.metrics.get(metric)
        if score is None:
            continue
        signed = score if greater_is_better else -score
        if best is None or signed >= best_score:
            best, best_score = info, signed
    return best


def expendable_versions(
    versions: Sequence[VersionInfo], limit: int, by: tuple[str, bool] | None = None
) -> list[VersionInfo]:
    """What retention may delete: neither the newest `limit`, nor the best, nor what is aliased or damaged.

    Args:
        versions: Newest last.
        limit: At least 1.
        by: The score that `best` goes by.
    """
    if limit < 1:
        raise EaglerayError(f"at least one version must stay, the limit is {limit}")
    best = best_version(versions, by)
    return [info for info in versions[:-limit] if info != best and not info.aliases and info.problem is None]
