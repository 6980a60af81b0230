"""How the command line changes the versions of a running server: over HTTP, with the token of its record."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import httpx

from eagleray.errors import ServingError, UsageError
from eagleray_serving.home import Home, ServerRecord
from eagleray_serving.protection import trusting

HTTP_TIMEOUT_S = 30.0
POLL_S = 0.3
# Seconds without any replica after which nobody waits for one to try a version.
ALONE_S = 5.0


def choose_server(records: Sequence[ServerRecord], name: str, server: str | None) -> ServerRecord:
    """Find the server that a command about a model means.

    Raises:
        UsageError: There is none, or several could be meant.
    """
    found = [each for each in records if server is None or each.id == server]
    if not found:
        known = ", ".join(each.id for each in records) or "none runs"
        raise UsageError(f"there is no server {server!r}" if server else "no server runs", f"there are: {known}")
    serving = [each for each in found if name in served_names(each)]
    if not serving:
        names = ", ".join(sorted({name for each in found for name in served_names(each)}))
        raise UsageError(f"no server here serves {name!r}", f"there are: {names}")
    if len(serving) > 1:
        listed = ", ".join(f"{each.id} ({each.url})" for each in serving)
        raise UsageError(f"{len(serving)} servers serve {name}", f"name one with --server: {listed}")
    return serving[0]


def served_names(record: ServerRecord) -> list[str]:
    """Return the names of a server's models."""
    return [ref.partition("@")[0] for ref in record.models]


def divides_for(version: str) -> Callable[[dict[str, Any]], bool]:
    """Return whether a view says that every replica gives a part of the requests to a canary."""

    def holds(shown: dict[str, Any]) -> bool:
        is_begun = bool(shown["canary"]) and shown["canary"]["version"] == version
        return is_begun and shown["dividing"] == sum(shown["replicas"].values())

    return holds


def answers_alone(version: str) -> Callable[[dict[str, Any]], bool]:
    """Return whether a view says that a version answers all requests on every replica."""

    def holds(shown: dict[str, Any]) -> bool:
        is_alone = not shown["canary"] and not shown["loading"] and not shown["dividing"]
        return is_alone and shown["current"] == version and set(shown["replicas"]) == {version}

    return holds


class Commander:
    """Commands one running server.

    Args:
        home: Where its token is.
        record: The server.
    """

    def __init__(self, home: Home, record: ServerRecord) -> None:
        self._record = record
        self._trust = trusting(record.certificate)
        token = home.token(record.id)
        self._headers = {} if token is None else {"authorization": f"Bearer {token}"}

    def rollouts(self) -> dict[str, dict[str, Any]]:
        """Return what is known of the versions of its models.

        Raises:
            ServingError: It does not answer.
        """
        return {model["name"]: model["rollout"] for model in self.models() if "rollout" in model}

    def models(self) -> list[dict[str, Any]]:
        """Return what the server says of its models: state, replicas, versions.

        Raises:
            ServingError: It does not answer.
        """
        models: list[dict[str, Any]] = self._call("GET", "/v1/models")["models"]
        return models

    def canary(self, name: str, ref: str, percent: float) -> str:
        """Begin a canary; returns its version."""
        return self._command(name, "canary", {"ref": ref, "percent": percent})

    def promote(self, name: str) -> str:
        """Let the canary take over; returns its version."""
        return self._command(name, "promote", {})

    def roll_back(self, name: str) -> str:
        """Go back; returns the version that answers then."""
        return self._command(name, "rollback", {})

    def wait(
        self, name: str, version: str, done: Callable[[dict[str, Any]], bool], timeout_s: float
    ) -> dict[str, Any]:
        """Wait until every replica has done what was asked of a version; returns what is known then.

        Raises:
            ServingError: A replica refused the version, or the time is over.
        """
        deadline = time.monotonic() + timeout_s
        alone_since = time.monotonic()
        while True:
            shown = self.rollouts()[name]
            if done(shown):
                return shown
            last = shown["events"][-1] if shown["events"] else {}
            if shown["loading"] is None and (last.get("what"), last.get("version")) == ("refused", version):
                raise ServingError(
                    f"{name}@{version} was refused: {last['reason']}", f"{shown['current']} goes on"
                )
            if shown["replicas"]:
                alone_since = time.monotonic()
            elif time.monotonic() - alone_since > ALONE_S:
                return shown  # scaled to zero: the next replica tries it
            if time.monotonic() > deadline:
                raise ServingError(
                    f"the replicas did not follow within {timeout_s:g} s",
                    "eagleray serve status shows how far they are",
                )
            time.sleep(POLL_S)

    def _command(self, name: str, what: str, body: dict[str, Any]) -> str:
        return str(self._call("POST", f"/v1/models/{name}/{what}", body)["version"])

    def _call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        url = self._record.url + path
        try:
            response = httpx.request(
                method, url, json=body, headers=self._headers, timeout=HTTP_TIMEOUT_S, verify=self._trust
            )
            answer: dict[str, Any] = response.json()
        except (httpx.HTTPError, ValueError) as error:
            raise ServingError(
                f"{url} does not answer: {error}", "eagleray serve status shows what runs"
            ) from None
        if response.status_code != 200:
            said = answer.get("error", {})
            kind = UsageError if response.status_code in (409, 422) else ServingError
            raise kind(said.get("message", f"{url} answered {response.status_code}"), said.get("hint"))
        return answer


def models(home: Home, record: ServerRecord) -> list[dict[str, Any]]:
    """Return what a server says of its models; nothing where it does not answer."""
    if record.state != "ready":
        return []
    try:
        return Commander(home, record).models()
    except ServingError:
        return []
