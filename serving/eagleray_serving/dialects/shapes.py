"""A dialect's handler: what it raises is written in the dialect's own shape."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eagleray_serving.reception import route_of
from eagleray_serving.schema import WireError
from eagleray_serving.web import as_wire_error

Handler = Callable[[Request], Awaitable[Any]]
ErrorBody = Callable[[WireError], Mapping[str, Any]]


def answering(handle: Handler, error_body: ErrorBody) -> Callable[[Request], Awaitable[Response]]:
    """Return an endpoint that answers what a handler returns as JSON, and what it raises as the dialect does.

    Args:
        handle: Returns the body of the answer.
        error_body: The body of an error.
    """

    async def endpoint(request: Request) -> Response:
        try:
            return JSONResponse(await handle(request))
        except Exception as raised:
            error = as_wire_error(raised, f"{request.method} {route_of(request.scope)}")
            return JSONResponse(error_body(error), error.status, error.headers())

    return endpoint


def sentence(error: WireError) -> str:
    """Return an error as one sentence."""
    return error.message if error.hint is None else f"{error.message} ({error.hint})"


def text_list(value: Any, name: str) -> list[str]:
    """Return one text or several as a list.

    Raises:
        WireError: 422, it is neither.
    """
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        raise WireError(422, "invalid_request", f"{name} must be a text or a list of texts")
    return texts


def text_of(fields: Mapping[str, Any], name: str) -> str:
    """Return a field that must be a text.

    Raises:
        WireError: 422, it is missing or something else.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise WireError(422, "invalid_request", f"{name} must be a text")
    return value
