"""Where the controller of a server and its replicas leave word for each other: in Ray's own key-value store.

It outlives every process but Ray's head: a controller or a replica that starts again reads what is current.
"""

from __future__ import annotations

from typing import Protocol

from pydantic import TypeAdapter

from eagleray_serving.rollout import Report, Rollout

NAMESPACE = "eagleray"
_ROLLOUT = TypeAdapter(Rollout)
_REPORT = TypeAdapter(Report)


class Notes(Protocol):
    """Small values under keys, seen by all processes of a server."""

    def read(self, key: str) -> bytes | None:
        """Return a value; None: there is none."""

    def write(self, key: str, value: bytes) -> None:
        """Set a value."""

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with a prefix."""

    def remove(self, key: str) -> None:
        """Remove a value, if there is one."""


class RayNotes:
    """Notes in the key-value store of the Ray that this process belongs to."""

    def read(self, key: str) -> bytes | None:
        """Return a value; None: there is none."""
        from ray.experimental.internal_kv import _internal_kv_get

        value: bytes | None = _internal_kv_get(key, namespace=NAMESPACE)
        return value

    def write(self, key: str, value: bytes) -> None:
        """Set a value."""
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key, value, namespace=NAMESPACE)

    def keys(self, prefix: str) -> list[str]:
        """Return the keys that begin with a prefix."""
        from ray.experimental.internal_kv import _internal_kv_list

        return [key.decode() for key in _internal_kv_list(prefix, namespace=NAMESPACE)]

    def remove(self, key: str) -> None:
        """Remove a value, if there is one."""
        from ray.experimental.internal_kv import _internal_kv_del

        _internal_kv_del(key, namespace=NAMESPACE)


class Board:
    """What is said about one model of one server.

    Args:
        notes: Where it is kept.
        server: Id of the server: on a cluster, another one may serve a model of the same name.
        name: The model's name.
    """

    def __init__(self, notes: Notes, server: str, name: str) -> None:
        self._notes = notes
        self._root = f"rollout/{server}/{name}"

    def rollout(self) -> Rollout | None:
        """Return what the controller said last; None: nothing yet."""
        value = self._notes.read(f"{self._root}/state")
        return None if value is None else _ROLLOUT.validate_json(value)

    def tell(self, rollout: Rollout) -> None:
        """Say what is served: the controller's word."""
        self._notes.write(f"{self._root}/state", _ROLLOUT.dump_json(rollout))

    def report(self, report: Report) -> None:
        """Say what a replica does: its own word."""
        self._notes.write(f"{self._root}/replicas/{report.replica}", _REPORT.dump_json(report))

    def reports(self) -> list[Report]:
        """Return what all replicas said last, also those that are gone."""
        values = map(self._notes.read, self._notes.keys(f"{self._root}/replicas/"))
        return [_REPORT.validate_json(value) for value in values if value is not None]

    def forget(self, replica: str) -> None:
        """Remove the word of a replica that is gone."""
        self._notes.remove(f"{self._root}/replicas/{replica}")
