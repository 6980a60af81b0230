"""The light application at `/`: health, models, documents, and the bare routes that several models share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from eagleray_serving.asgi import Application, HTTPRequest, HTTPResponse, Route, json_response
from eagleray_serving.catalog import ModelCard, choose, find
from eagleray_serving.documents import docs_page, openapi_document
from eagleray_serving.schema import REQUESTS, Verb, WireError, parse_json

READY = "ready"


class Fleet(Protocol):
    """The models behind the edge."""

    async def states(self) -> Mapping[str, str]:
        """Return the state of each model by its name; `ready` is the good one."""

    async def hand_on(self, name: str, request: HTTPRequest) -> HTTPResponse:
        """Let a model answer a request.

        Raises:
            WireError: 503, no replica of it answered.
        """


class Edge:
    """The routes of the server that are no model's own.

    Args:
        cards: The models of the server.
        fleet: How to reach them.
        max_body_bytes: Largest body of a bare route: the largest that any model takes.
        body_timeout_s: Seconds in which a body must arrive.
    """

    def __init__(
        self, cards: Sequence[ModelCard], fleet: Fleet, *, max_body_bytes: int, body_timeout_s: float
    ) -> None:
        self._cards = tuple(cards)
        self._fleet = fleet
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._openapi = openapi_document(self._cards)
        self._docs = docs_page(self._openapi)

    def application(self) -> Application:
        """Return the ASGI application."""
        pages = {
            "/": self._index,
            "/healthz": self._health,
            "/readyz": self._readiness,
            "/v1/models": self._models,
            "/docs": self._page,
            "/openapi.json": self._document,
        }
        return Application(
            [
                *(Route("GET", path, handler) for path, handler in pages.items()),
                *(Route("POST", f"/v1/{verb}", self._bare) for verb in REQUESTS),
                *(Route("POST", f"/v1/{verb}/{{model}}", self._named) for verb in REQUESTS),
            ],
            max_body_bytes=self._max_body_bytes,
            body_timeout_s=self._body_timeout_s,
        )

    async def _index(self, request: HTTPRequest) -> HTTPResponse:
        links = {"docs": "/docs", "models": "/v1/models", "openapi": "/openapi.json", "ready": "/readyz"}
        return json_response({"name": "eagleray", **links})

    async def _health(self, request: HTTPRequest) -> HTTPResponse:
        return json_response({"status": "ok"})

    async def _readiness(self, request: HTTPRequest) -> HTTPResponse:
        states = await self._fleet.states()
        models = {card.name: states.get(card.name, "missing") for card in self._cards}
        waiting = [name for name, state in models.items() if state != READY]
        if waiting:
            raise WireError(
                503,
                "not_ready",
                "not ready: " + ", ".join(f"{name} ({models[name]})" for name in waiting),
                "ask again soon",
                retry_after_s=1,
            )
        return json_response({"status": READY, "models": models})

    async def _models(self, request: HTTPRequest) -> HTTPResponse:
        states = await self._fleet.states()
        return json_response(
            {"models": [{**card.as_json(), "state": states.get(card.name, "missing")} for card in self._cards]}
        )

    async def _page(self, request: HTTPRequest) -> HTTPResponse:
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return HTTPResponse(
            200, self._docs.encode(), "text/html; charset=utf-8", {"content-security-policy": policy}
        )

    async def _document(self, request: HTTPRequest) -> HTTPResponse:
        return json_response(self._openapi)

    async def _bare(self, request: HTTPRequest) -> HTTPResponse:
        verb: Verb = request.path.rpartition("/")[2]  # type: ignore[assignment]
        card = choose(self._cards, verb, parse_json(request.body))
        return await self._fleet.hand_on(card.name, replace(request, path=card.path))

    async def _named(self, request: HTTPRequest) -> HTTPResponse:
        # A model that stands here has its own application; only a wrong name falls through to the edge.
        verb = request.path.split("/")[2]
        card = find([card for card in self._cards if card.verb == verb], request.parameters["model"])
        return await self._fleet.hand_on(card.name, request)
