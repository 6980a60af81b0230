"""The light application at `/`: health, models, documents, and the bare routes that several models share."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from typing import Any, Protocol

from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from eagleray_serving.answering import Asking
from eagleray_serving.bodies import LARGE_BODY_BYTES, LargeBodies
from eagleray_serving.bulk_service import BulkService
from eagleray_serving.catalog import ModelCard, choose, find
from eagleray_serving.dialects import Models, dialect_routes
from eagleray_serving.documents import PAGES, demand_key, docs_page, operation
from eagleray_serving.gate import Gate
from eagleray_serving.guarded import GuardedFleet
from eagleray_serving.keys import METRICS
from eagleray_serving.lines import wants_lines
from eagleray_serving.metrics import CONTENT_TYPE, Reports
from eagleray_serving.page import VARY, Page, is_wanted
from eagleray_serving.reception import framing
from eagleray_serving.schema import REQUESTS, WireError, parse_json
from eagleray_serving.visits import current_visit, require
from eagleray_serving.web import read_body, request_id

READY = "ready"
# Pages that are no JSON.
MEDIA = {"/docs": HTMLResponse, "/metrics": PlainTextResponse}


class Fleet(Protocol):
    """The models behind the edge."""

    async def states(self) -> Mapping[str, str]:
        """Return the state of each model by its name; `ready` is the good one."""

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        """Return how many replicas of each model run, and what autoscaling last saw and wanted."""

    async def hand_on(self, name: str, body: bytes, asking: Asking) -> Response:
        """Let a model answer a body.

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
        gate: What stands before the routes; asks nobody for a key by default.
        versions: What is known of the versions of each model; None: they never change.
        bulk: Large requests of each model; those of a model without are handed on like small ones.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        fleet: Fleet,
        *,
        max_body_bytes: int,
        body_timeout_s: float,
        gate: Gate | None = None,
        versions: Callable[[], Mapping[str, Mapping[str, Any]]] | None = None,
        bulk: Mapping[str, BulkService] | None = None,
    ) -> None:
        self._cards = tuple(cards)
        self._gate = gate or Gate()
        self._fleet = GuardedFleet(fleet, cards, self._gate)
        self.reports = Reports()
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._versions = versions
        self._bulk = bulk or {}
        self._bodies = LargeBodies()
        self._for_people = Page()

    def application(self) -> FastAPI:
        """Return the ASGI application."""
        app = FastAPI(
            title="Eagleray",
            version=version("eagleray"),
            redirect_slashes=False,
            docs_url=None,
            redoc_url=None,
            **framing(self._gate),
        )
        pages = (self._health, self._readiness, self._models, self._metrics, self._page, self._index)
        for (path, summary), page in zip(PAGES.items(), pages, strict=True):
            app.add_api_route(path, page, summary=summary, response_class=MEDIA.get(path, JSONResponse))
        # A model that stands at its named route has an application of its own there; these describe it.
        for card in self._cards:
            pair = f", {card.source} to {card.target}" if card.source else ""
            self._add_model_route(app, card.path, operation(card.verb, f"{card.ref}{pair}"))
        for verb in {card.verb: None for card in self._cards}:
            names = ", ".join(card.name for card in self._cards if card.verb == verb)
            self._add_model_route(app, f"/v1/{verb}", operation(verb, f"Any of {names}"))
        for verb in REQUESTS:
            self._add_model_route(app, f"/v1/{verb}", {"include_in_schema": False})
            self._add_model_route(app, f"/v1/{verb}/{{model}}", {"include_in_schema": False})
        if self._gate.ring.is_asked:
            demand_key(app.openapi())
        self._docs = docs_page(app.openapi())
        models = Models(
            self._cards, self._fleet.states, self._answer, self._gate, self._bodies,
            max_body_bytes=self._max_body_bytes, body_timeout_s=self._body_timeout_s,
        )  # fmt: skip
        app.router.routes.extend([*dialect_routes(models), *self._for_people.routes()])
        return app

    def _add_model_route(self, app: FastAPI, path: str, options: Mapping[str, Any]) -> None:
        app.add_api_route(path, self._hand_on, methods=["POST"], **options)

    async def _index(self, request: Request) -> Response:
        if is_wanted(request.headers):
            return self._for_people.respond(request)
        links = {"docs": "/docs", "models": "/v1/models", "openapi": "/openapi.json", "ready": "/readyz"}
        return JSONResponse({"name": "eagleray", **links}, headers=VARY)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def _readiness(self, request: Request) -> Response:
        states = await self._fleet.states()
        models = {card.name: states.get(card.name, "missing") for card in self._cards}
        waiting = [name for name, state in models.items() if state != READY]
        # It needs no key, so it tells what is served only to those who have one.
        visit = current_visit()
        is_told = not self._gate.ring.is_asked or (visit is not None and visit.key is not None)
        if waiting:
            listed = ", ".join(f"{name} ({models[name]})" for name in waiting)
            message = f"not ready: {listed}" if is_told else "not every model is ready"
            raise WireError(503, "not_ready", message, "ask again soon", retry_after_s=1)
        return JSONResponse({"status": READY, "models": models} if is_told else {"status": READY})

    async def _models(self, request: Request) -> Response:
        states, replicas = await self._fleet.states(), await self._fleet.replicas()
        rollouts = await asyncio.to_thread(self._versions) if self._versions is not None else {}
        queued = self.reports.queued_tokens()
        models = []
        for card in self._cards:
            rollout = rollouts.get(card.name)
            shown = card
            if rollout is not None:
                scores = rollout.get("scores", {})
                rollout = {key: value for key, value in rollout.items() if key != "scores"}
                shown = replace(card, version=rollout["current"], scores=scores)
            running = replicas.get(card.name)
            if running is not None and card.name in queued:
                running = {**running, "queued_tokens": queued[card.name]}
            state = {"state": states.get(card.name, "missing"), "replicas": running}
            models.append({**shown.as_json(), **state} | ({} if rollout is None else {"rollout": rollout}))
        return JSONResponse({"models": models})

    async def _metrics(self, request: Request) -> Response:
        require(METRICS)
        return Response(self.reports.render(self._gate.metrics), media_type=CONTENT_TYPE)

    async def _page(self, request: Request) -> Response:
        policy = "default-src 'none'; style-src 'unsafe-inline'"
        return HTMLResponse(self._docs, headers={"content-security-policy": policy})

    async def spread(self, name: str, body: bytes, asking: Asking, *, lines: bool) -> Response:
        """Answer a large request by all replicas of its model."""
        return await self._bulk[name].respond(body, asking, lines=lines)

    async def _hand_on(self, request: Request) -> Response:
        verb, *name = request.scope["path"].removeprefix("/v1/").split("/", 1)
        with self._bodies.place(request):
            body = await read_body(request, self._max_body_bytes, self._body_timeout_s)
            parsed = parse_json(body)
            if name:
                card = find([card for card in self._cards if card.verb == verb], name[0])
            else:
                card = choose(self._cards, verb, parsed)
            asking, lines = Asking(request_id(request)), wants_lines(request.headers)
            return await self._answer(card, parsed, body, asking, lines=lines)

    async def _answer(
        self, card: ModelCard, parsed: Mapping[str, Any], body: bytes, asking: Asking, *, lines: bool = False
    ) -> Response:
        """Let one replica of a model answer a body, or all of them where it is large."""
        bulk = self._bulk.get(card.name)
        if bulk is not None and (lines or len(body) > LARGE_BODY_BYTES or bulk.is_large(parsed)):
            return await self.spread(card.name, body, asking, lines=lines)
        return await self._fleet.hand_on(card.name, body, asking)
