"""A small ASGI application: exact routes, one error shape, limits on the body, no redirects.

FastAPI answers 500 to a lone surrogate in a refused field, echoes a 100 kB input in its 422 and redirects at an
application's own prefix; the dozen routes of a server need none of what it adds.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from eagleray_serving.schema import MAX_SHOWN_CHARACTERS, WireError, error_body

logger = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

# A body over the limit is read to its end up to this multiple, so that the client sees the answer and no reset.
DRAIN_FACTOR = 4


@dataclass(frozen=True, slots=True)
class HTTPRequest:
    """A whole request; crosses processes when the edge hands it on.

    Attributes:
        method: `GET`, `POST`, ...
        path: The whole path, decoded, without a trailing slash.
        headers: Lower-case names; of repeated headers the last.
        body: The whole body.
        parameters: The parts of the path that the route names.
    """

    method: str
    path: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    parameters: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class HTTPResponse:
    """A whole answer."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)


Handler = Callable[[HTTPRequest], Awaitable[HTTPResponse]]


@dataclass(frozen=True, slots=True)
class Route:
    """A method and a path; a segment such as `{model}` matches any one segment."""

    method: str
    path: str
    handler: Handler

    def match(self, path: str) -> dict[str, str] | None:
        """Return the named segments, or None where the path is another one."""
        wanted, found = self.path.split("/"), path.split("/")
        if len(wanted) != len(found):
            return None
        parameters = {}
        for want, part in zip(wanted, found, strict=True):
            if want.startswith("{"):
                parameters[want[1:-1]] = part
            elif want != part:
                return None
        return parameters


def json_response(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> HTTPResponse:
    """Return a JSON answer.

    Raises:
        ValueError: The value holds NaN, an infinite number or a lone surrogate, which JSON cannot carry.
        TypeError: The value is of a type that JSON does not have.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return HTTPResponse(status, text.encode(), headers=headers or {})


def error_response(error: WireError) -> HTTPResponse:
    """Return the answer that an error stands for."""
    return json_response(error.body(), error.status, error.headers())


class Application:
    """Routes as an ASGI application.

    Args:
        routes: The routes; the first that matches answers.
        max_body_bytes: Largest body; beyond it the answer is 413.
        body_timeout_s: Seconds in which the body must arrive; beyond it the answer is 408.
    """

    def __init__(self, routes: Sequence[Route], *, max_body_bytes: int, body_timeout_s: float) -> None:
        self._routes = tuple(routes)
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one connection event, as ASGI asks."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1003})
        else:
            response = await self._answer(scope, receive)
            await _send(response, send, head=scope["method"] == "HEAD")

    async def respond(self, request: HTTPRequest) -> HTTPResponse:
        """Answer a whole request; every failure becomes an answer in the one error shape."""
        try:
            route, parameters = self._find(request)
            return await route.handler(
                HTTPRequest(request.method, request.path, request.headers, request.body, parameters)
            )
        except WireError as error:
            return error_response(error)
        except Exception:
            logger.exception("%s %s failed", request.method, ascii(request.path[:MAX_SHOWN_CHARACTERS]))
            return json_response(
                error_body("internal", "the server failed on this request", "its log has the traceback"), 500
            )

    async def _answer(self, scope: Scope, receive: Receive) -> HTTPResponse:
        head = HTTPRequest(scope["method"], whole_path(scope), _headers(scope))
        try:
            # Before the body is read: a client that sends 8 MB to a path that does not exist learns it at once.
            self._find(head)
            body = await self._read(head, receive)
        except WireError as error:
            return error_response(error)
        return await self.respond(HTTPRequest(head.method, head.path, head.headers, body))

    def _find(self, request: HTTPRequest) -> tuple[Route, dict[str, str]]:
        matches = [(route, found) for route in self._routes if (found := route.match(request.path)) is not None]
        if not matches:
            raise WireError(
                404,
                "not_found",
                f"there is no {request.path[:MAX_SHOWN_CHARACTERS]!a}",
                "GET /docs lists the routes",
            )
        method = "GET" if request.method == "HEAD" else request.method
        for route, found in matches:
            if route.method == method:
                return route, found
        allowed = tuple(sorted({route.method for route, _ in matches}))
        raise WireError(
            405,
            "method_not_allowed",
            f"{request.method[:16]} is not possible here",
            f"use {' or '.join(allowed)}",
            allow=allowed,
        )

    async def _read(self, head: HTTPRequest, receive: Receive) -> bytes:
        if head.method == "POST":
            _check_media_type(head.headers)
        chunks: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._body_timeout_s):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        # Nobody reads this answer; it ends the request without running the model.
                        raise WireError(408, "disconnected", "the client closed the connection")
                    chunk = message.get("body", b"")
                    num_bytes += len(chunk)
                    if num_bytes <= self._max_body_bytes:
                        chunks.append(chunk)
                    elif num_bytes > self._max_body_bytes * DRAIN_FACTOR:
                        raise self._too_large()
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise WireError(
                408,
                "request_timeout",
                f"the body did not arrive within {self._body_timeout_s:g} s",
                "send the request again",
            ) from None
        if num_bytes > self._max_body_bytes:
            raise self._too_large()
        return b"".join(chunks)

    def _too_large(self) -> WireError:
        return WireError(
            413,
            "body_too_large",
            f"the body is larger than {self._max_body_bytes} bytes",
            "send several smaller requests, or raise serve.max_body_bytes",
        )


def whole_path(scope: Scope) -> str:
    """Return the path as the client sent it, without a trailing slash.

    Serve's Python proxy and its direct ingress differ in whether `path` repeats `root_path`; a client must not see
    a difference, nor one between `/v1/translate` and `/v1/translate/`.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and path != root and not path.startswith(root + "/"):
        path = root + path
    return path.rstrip("/") or "/"


def _headers(scope: Scope) -> dict[str, str]:
    return {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope.get("headers", ())}


def _check_media_type(headers: Mapping[str, str]) -> None:
    media_type, _, parameters = headers.get("content-type", "application/json").partition(";")
    charset = parameters.lower().replace('"', "").replace(" ", "")
    json_like = media_type.strip().lower()
    accepted = json_like == "application/json" or (
        json_like.startswith("application/") and json_like.endswith("+json")
    )
    if not accepted or charset not in ("", "charset=utf-8", "charset=utf8"):
        raise WireError(
            415,
            "unsupported_media_type",
            "the body must be application/json in UTF-8",
            "send the header `Content-Type: application/json`",
        )
    if headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise WireError(
            415, "unsupported_media_type", "a compressed body is not accepted", "send the body uncompressed"
        )


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def _send(response: HTTPResponse, send: Send, *, head: bool) -> None:
    headers = {
        "content-type": response.content_type,
        "content-length": str(len(response.body)),
        "x-content-type-options": "nosniff",
        **response.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": response.status,
            "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": b"" if head else response.body})
