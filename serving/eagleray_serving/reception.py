"""How every application is framed: whole paths, the gate, and one shape for whatever goes wrong."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray_serving.gate import Gate
from eagleray_serving.haproxy_launcher import METHODS
from eagleray_serving.schema import WireError, headers_too_large, url_too_long
from eagleray_serving.visits import Visit, enter
from eagleray_serving.web import WholePath, failure, given_or_new_id, handle

UNMATCHED = "unmatched"
# What a method that nobody has heard of is counted as: a client must not make series.
OTHER = "other"
LINE_BYTES = len(": \r\n")


def framing(gate: Gate) -> dict[str, Any]:
    """Return the arguments that every application is made with."""
    # Starlette's own place for unexpected exceptions answers and then raises them once more, for its server's log.
    unexpected = Middleware(ExceptionMiddleware, handlers={Exception: handle})
    return {
        "middleware": [Middleware(WholePath), Middleware(Reception, gate=gate), unexpected],
        "exception_handlers": {WireError: handle, HTTPException: handle},
    }


class Reception:
    """Middleware: receives a visit, lets it through the gate, and takes note of how it was answered."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection event on, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        visit = Visit(given_or_new_id(headers))
        enter(visit)
        status = 500
        is_named = not self._gate.returns_ids

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if not is_named:
                    message["headers"] = [*message["headers"], (b"x-request-id", visit.id.encode())]
            await send(message)

        try:
            try:
                self._check_size(scope)
                visit.key = self._gate.authenticate(scope, headers)
            except WireError as error:
                await failure(error, "a request")(scope, receive, send_on)
                return
            await self._app(scope, receive, send_on)
        finally:
            method = scope["method"] if scope["method"] in METHODS else OTHER
            self._gate.leave(visit, method, route_of(scope), status, _address(scope, headers))

    def _check_size(self, scope: Scope) -> None:
        limit = self._gate.max_header_bytes
        num_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        if num_bytes > limit:
            raise url_too_long(limit)
        num_bytes += sum(len(name) + len(value) + LINE_BYTES for name, value in scope["headers"])
        if num_bytes > limit:
            raise headers_too_large(limit)


def route_of(scope: Scope) -> str:
    """Return the route that a request took, its parameters by their names: what may be counted."""
    route = scope.get("route")
    if route is not None:
        return str(route.path)
    if "endpoint" not in scope:
        return UNMATCHED
    path = str(scope["path"])
    for name, value in scope.get("path_params", {}).items():
        path = path.removesuffix(str(value)) + f"{{{name}}}"
    return path


def _address(scope: Scope, headers: Headers) -> str | None:
    # The front says whom it speaks for; on a port of loopback nobody else is heard.
    client = scope.get("client")
    return headers.get("x-forwarded-for") or (None if client is None else str(client[0]))
