"""Aliases: create-only records of which the highest wins; the others are the history."""

from __future__ import annotations

import re
from dataclasses import dataclass

from eagleray.errors import AlreadyExistsError, NotFoundError, UsageError
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record, read_record

_ALIAS = re.compile(r"[a-z][a-z0-9._-]{0,63}")
_RESERVED = re.compile(r"latest|best|step-.*|r\d+-step-.*")
_RECORD = re.compile(r"(\d{8})\.json")
_MAX_RACES = 20


@dataclass(frozen=True, slots=True)
class AliasRecord:
    """What an alias was set to.

    Attributes:
        sequence: Number of the record; the highest counts.
        version: The version; None: the alias was removed.
        manifest_sha256: Hash of its manifest: the alias means these bytes and no others.
        created: When.
        note: Why, in the user's words.
    """

    sequence: int
    version: str | None
    manifest_sha256: str | None
    created: str
    note: str


def validate_alias(text: str) -> str:
    """Return an alias if it may be one.

    Raises:
        UsageError: Other characters, or a word that has a meaning of its own.
    """
    if _ALIAS.fullmatch(text) is None or _RESERVED.fullmatch(text):
        raise UsageError(
            f"{ascii(text)[:80]} is not an alias",
            hint="Small letters, digits, `.`, `_` and `-`, a letter first; not latest, best or a step.",
        )
    return text


def aliases_dir(name: str) -> str:
    """The prefix of a name's aliases."""
    return f"models/{name}/aliases"


def read_alias(store: ObjectStore, name: str, alias: str) -> AliasRecord | None:
    """The record that counts; None: the alias was never set, or was removed."""
    sequences = _sequences(store, name, alias)
    record = _read(store, name, alias, sequences[-1]) if sequences else None
    return None if record is None or record.version is None else record


def read_aliases(store: ObjectStore, name: str) -> dict[str, AliasRecord]:
    """All aliases of a name."""
    found = {alias: read_alias(store, name, alias) for alias in store.children(aliases_dir(name))}
    return {alias: record for alias, record in found.items() if record is not None}


def read_history(store: ObjectStore, name: str, alias: str) -> list[AliasRecord]:
    """Every record of an alias, oldest first."""
    return [_read(store, name, alias, sequence) for sequence in _sequences(store, name, alias)]


def append_alias(
    store: ObjectStore, name: str, alias: str, version: str | None, manifest_sha256: str | None, note: str
) -> AliasRecord:
    """Add a record after all others.

    Raises:
        AlreadyExistsError: Others were faster, again and again.
    """
    for _ in range(_MAX_RACES):
        sequences = _sequences(store, name, alias)
        sequence = sequences[-1] + 1 if sequences else 1
        values = {"version": version, "manifest_sha256": manifest_sha256, "note": note}
        try:
            create_record(store, _key(name, alias, sequence), values)
        except AlreadyExistsError:
            continue
        return _read(store, name, alias, sequence)
    raise AlreadyExistsError(f"alias {alias} of {name} is being set by others all the time", hint="Try again.")


def previous_record(history: list[AliasRecord]) -> AliasRecord:
    """The record that a rollback goes back to: the last one that names another version.

    Raises:
        NotFoundError: There is none.
    """
    if history:
        for record in reversed(history):
            if record.version is not None and record.version != history[-1].version:
                return record
    raise NotFoundError("the alias has no earlier version to go back to")


def _sequences(store: ObjectStore, name: str, alias: str) -> list[int]:
    keys = [info.key.rsplit("/", 1)[-1] for info in store.list(f"{aliases_dir(name)}/{alias}")]
    return sorted(int(match[1]) for match in map(_RECORD.fullmatch, keys) if match)


def _read(store: ObjectStore, name: str, alias: str, sequence: int) -> AliasRecord:
    record = read_record(store, _key(name, alias, sequence))
    return AliasRecord(
        sequence=sequence,
        version=record.get("version"),
        manifest_sha256=record.get("manifest_sha256"),
        created=str(record.get("created")),
        note=str(record.get("note", "")),
    )


def _key(name: str, alias: str, sequence: int) -> str:
    return f"{aliases_dir(name)}/{alias}/{sequence:08d}.json"
