"""The page at `/` for people: files of this package, sent as they are, that ask the routes that any client asks.

A browser gets it, everybody else gets the JSON that was always there. It loads nothing from elsewhere and runs no
script but its own, which the policy it is sent with makes sure of.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

FOLDER = "assets"
DOCUMENT = "page.html"
ASSETS = ("page.css", "page.js", "wire.js", "models.js", "answers.js", "icon.svg")
ASSET_PATHS = tuple(f"/{FOLDER}/{name}" for name in ASSETS)
MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
    )
)
VARY = {"vary": "accept"}
# Asked for each time, and sent only where it has changed: a new server's page is never half an old one.
HEADERS = {
    "cache-control": "no-cache",
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-frame-options": "DENY",
}


def is_wanted(headers: Headers) -> bool:
    """Whether a client is a browser: one that names HTML among what it takes, and not JSON."""
    accepted = headers.get("accept", "").lower()
    return "text/html" in accepted and "application/json" not in accepted


class Page:
    """The files, read once."""

    def __init__(self) -> None:
        folder = files("eagleray_serving") / FOLDER
        self._contents = {name: (folder / name).read_bytes() for name in (DOCUMENT, *ASSETS)}
        self._tags = {name: f'"{hashlib.sha256(data).hexdigest()[:32]}"' for name, data in self._contents.items()}

    def routes(self) -> list[Route]:
        """Return the routes of what the page loads."""
        return [Route(path, self._asset, methods=["GET"]) for path in ASSET_PATHS]

    def respond(self, request: Request) -> Response:
        """Return the page itself."""
        return self._send(DOCUMENT, request.headers, VARY)

    async def _asset(self, request: Request) -> Response:
        return self._send(request.scope["path"].removeprefix(f"/{FOLDER}/"), request.headers, {})

    def _send(self, name: str, asked: Headers, more: dict[str, str]) -> Response:
        tag = self._tags[name]
        headers = {**HEADERS, **more, "etag": tag}
        known = {each.strip().removeprefix("W/") for each in asked.get("if-none-match", "").split(",")}
        if known & {tag, "*"}:
            return Response(status_code=304, headers=headers)
        return Response(self._contents[name], headers=headers, media_type=MEDIA_TYPES[name.rpartition(".")[2]])
