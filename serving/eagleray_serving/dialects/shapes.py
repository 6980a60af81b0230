"""What the dialects share: their handlers, the header of versions, and how fields are read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from starlette.requests import Request

from eagleray_serving.schema import WireError

Handler = Callable[[Request], Awaitable[Any]]
ErrorBody = Callable[[WireError], Mapping[str, Any]]

MODEL_VERSION = "x-model-version"


def note_version(request: Request, ref: str) -> None:
    """Note that a version has answered a request, or a part of it."""
    request.state.answered_by = [*getattr(request.state, "answered_by", ()), ref]


def version_header(request: Request) -> dict[str, str]:
    """Return the header that names the versions that answered: most dialects have no place for them in a body."""
    refs = dict.fromkeys(getattr(request.state, "answered_by", ()))
    return {MODEL_VERSION: ", ".join(refs)} if refs else {}


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
