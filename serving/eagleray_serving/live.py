"""What a server says about its replicas, asked over HTTP: for `serve status`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from eagleray_serving.home import ServerRecord
from eagleray_serving.protection import trusting

TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class Live:
    """The replicas of a server.

    Attributes:
        replicas: Of each model by its name; None: the server did not say.
    """

    replicas: Mapping[str, Any] | None

    def describe(self, refs: Sequence[str]) -> list[str]:
        """Return references with the number of replicas that run behind each."""
        if self.replicas is None:
            return list(refs)
        counts = {name: (found or {}).get("running", 0) for name, found in self.replicas.items()}
        return [f"{ref} ({counts.get(ref.partition('@')[0], 0)})" for ref in refs]


def running(record: ServerRecord, token: str | None = None) -> Live:
    """Ask a server that is ready; one that does not answer soon is not waited for.

    Args:
        record: The server.
        token: The secret of its owner, which opens what others need a key for.
    """
    if record.state != "ready":
        return Live(None)
    try:
        headers = {} if token is None else {"authorization": f"Bearer {token}"}
        trust = trusting(record.certificate)
        response = httpx.get(record.url + "/v1/models", timeout=TIMEOUT_S, headers=headers, verify=trust)
        response.raise_for_status()
        return Live({model["name"]: model.get("replicas") for model in response.json()["models"]})
    except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError):
        return Live(None)
