"""What every application here shares, on top of Starlette: one error shape, bounded bodies, whole paths.

A body is read as bytes and parsed by `schema`: as a parameter of FastAPI's, a lone surrogate in a refused field
would be a 500, and a refused input of 100 kB would be repeated in the answer.
"""

from __future__ import annotations

import asyncio
import logging
import re
import uuid
from collections.abc import Mapping
from typing import Literal

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eagleray_serving.haproxy_launcher import REQUEST_ID
from eagleray_serving.schema import MAX_SHOWN_CHARACTERS, WireError
from eagleray_serving.visits import current_visit

logger = logging.getLogger(__name__)

# A body over the limit is read to its end up to this multiple, so that the client sees the answer and no reset.
DRAIN_FACTOR = 4
_REQUEST_ID = re.compile(REQUEST_ID)


class WholePath:
    """Middleware: the same path behind every front and with a slash at its end, and HEAD as GET without a body."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass one connection event on, as ASGI asks."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        is_head = scope["method"] == "HEAD"

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            elif is_head:
                message["body"] = b""
            await send(message)

        method = "GET" if is_head else scope["method"]
        scope = {**scope, "method": method, "path": whole_path(scope), "root_path": ""}
        await self._app(scope, receive, send_on)


def whole_path(scope: Scope) -> str:
    """Return the path as the client sent it, without a trailing slash.

    Serve's Python proxy and its direct ingress differ in whether `path` repeats `root_path`; a client must not see
    a difference, nor one between `/v1/translate` and `/v1/translate/`.
    """
    path, root = str(scope["path"]), str(scope.get("root_path", "")).rstrip("/")
    if root and path != root and not path.startswith(root + "/"):
        path = root + path
    return path.rstrip("/") or "/"


def failure(error: Exception, what: str) -> Response:
    """Return the answer that a failure stands for; one of our own is logged, and not shown.

    Args:
        error: What was raised.
        what: What failed, for the log.
    """
    wire = as_wire_error(error, what)
    return JSONResponse(wire.body(), wire.status, wire.headers())


def as_wire_error(error: Exception, what: str) -> WireError:
    """Return the error that a failure stands for; one of our own is logged, and not shown.

    Args:
        error: What was raised.
        what: What failed, for the log.
    """
    if isinstance(error, WireError):
        return error
    logger.error("%s failed", what, exc_info=error)
    return WireError(500, "internal", "the server failed on this request", "its log has the traceback")


def request_id(request: Request) -> str:
    """Return the id of a request: the one that it carries in `X-Request-Id`, or the one that it was given."""
    visit = current_visit()
    return given_or_new_id(request.headers) if visit is None else visit.id


def given_or_new_id(headers: Headers) -> str:
    """Return the id that the headers carry, or a new one where they carry none that may be logged."""
    given = headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


async def read_body(
    request: Request, max_body_bytes: int, timeout_s: float, *, accepts: Literal["json"] | None = "json"
) -> bytes:
    """Read a body.

    Args:
        request: The request.
        max_body_bytes: Largest body.
        timeout_s: Seconds in which it must arrive.
        accepts: What it must say that it is; None: anything.

    Raises:
        WireError: 408, 413 or 415.
    """
    if accepts == "json":
        _check_media_type(request.headers)
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(timeout_s):
            async for chunk in request.stream():
                num_bytes += len(chunk)
                if num_bytes <= max_body_bytes:
                    chunks.append(chunk)
                elif num_bytes > max_body_bytes * DRAIN_FACTOR:
                    break
    except TimeoutError:
        message = f"the body did not arrive within {timeout_s:g} s"
        raise WireError(408, "request_timeout", message, "send the request again") from None
    except ClientDisconnect:
        # Nobody reads this answer; it ends the request without running the model.
        raise WireError(408, "disconnected", "the client closed the connection") from None
    if num_bytes > max_body_bytes:
        raise WireError(
            413,
            "body_too_large",
            f"the body is larger than {max_body_bytes} bytes",
            "send several smaller requests, or raise serve.max_body_bytes",
        )
    return b"".join(chunks)


async def handle(request: Request, error: Exception) -> Response:
    """Return the answer that an exception stands for, as a handler of Starlette's."""
    shown = ascii(request.scope["path"][:MAX_SHOWN_CHARACTERS])
    if isinstance(error, HTTPException):
        error = _not_routed(request.method, shown, error.headers or {})
    return failure(error, f"{request.method} {shown}")


def _not_routed(method: str, path: str, headers: Mapping[str, str]) -> WireError:
    """Return the error that the router's own refusal stands for."""
    if "Allow" not in headers:
        return WireError(404, "not_found", f"there is no {path}", "GET /docs lists the routes")
    allowed = tuple(headers["Allow"].split(", "))
    message = f"{method[:16]} is not possible here"
    return WireError(405, "method_not_allowed", message, f"use {' or '.join(allowed)}", allow=allowed)


def _check_media_type(headers: Headers) -> None:
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
