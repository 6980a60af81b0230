"""An answer as it grows, line by line (NDJSON): each item in order with its index, and a last line about all."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from eagleray_serving.answering import Answered, ItemFailure
from eagleray_serving.bulk import Part
from eagleray_serving.catalog import ModelCard
from eagleray_serving.schema import ANSWER_KEYS, WireError, error_body
from eagleray_serving.web import failure

MEDIA_TYPE = "application/x-ndjson"


def wants_lines(headers: Headers) -> bool:
    """Whether a client asks for an answer in lines."""
    return MEDIA_TYPE in headers.get("accept", "").lower()


class LinesResponse(StreamingResponse):
    """Lines; whatever ends the response ends what makes them.

    Args:
        card: The model.
        first: The part that is known already.
        parts: The others.
    """

    def __init__(self, card: ModelCard, first: Part | None, parts: AsyncGenerator[Part, None]) -> None:
        lines = write_lines(card, first, parts)
        # A front that gathers small pieces would take the point of lines away.
        super().__init__(lines, media_type=MEDIA_TYPE, headers={"x-accel-buffering": "no"})
        self._lines, self._parts = lines, parts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the lines."""
        async with aclosing(self):
            await super().__call__(scope, receive, send)

    async def aclose(self) -> None:
        """End what makes the lines."""
        await self._lines.aclose()
        await self._parts.aclose()


async def write_lines(
    card: ModelCard, first: Part | None, parts: AsyncIterator[Part]
) -> AsyncGenerator[bytes, None]:
    """Yield the lines of an answer, those of a part at once.

    Args:
        card: The model.
        first: The part that is known already.
        parts: The others; what they raise becomes the last line.
    """
    key = ANSWER_KEYS[card.verb].removesuffix("s")
    counts: dict[str, int] = {}
    count = 0
    try:
        part = first
        while part is not None:
            yield b"".join(_line(key, part.start + offset, item, part) for offset, item in enumerate(part.items))
            count += len(part.items)
            if part.version is not None:
                counts[part.version] = counts.get(part.version, 0) + len(part.items)
            part = await anext(parts, None)
    except Exception as error:
        if not isinstance(error, WireError):
            failure(error, f"a request to {card.ref} in lines")  # logs it
            error = WireError(500, "internal", "the server failed on this request", "its log has the traceback")
        yield _encode(error.body())
        return
    # Rollouts may change the version on the way: then every line's own one counts.
    version = max(counts, key=counts.__getitem__, default=card.version)
    versions = {"versions": counts} if len(counts) > 1 else {}
    yield _encode({"model": card.name, "version": version, "count": count, **versions})


def _line(key: str, index: int, item: Answered, part: Part) -> bytes:
    if isinstance(item, ItemFailure):
        return _encode({"index": index, **error_body(item.code, item.message, item.hint), "version": part.version})
    line: Mapping[str, Any] = {"index": index, key: item, "version": part.version}
    try:
        return _encode(line)
    except (ValueError, TypeError) as error:
        reason = f"the task's answer is not JSON: {error}"
        return _encode({"index": index, **error_body("bad_answer", reason, "return plain JSON values")})


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode() + b"\n"
