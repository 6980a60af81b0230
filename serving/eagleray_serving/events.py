"""One answer as it grows: server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import StreamingResponse

from eagleray_serving.answering import Answers, ItemFailure
from eagleray_serving.schema import WireError
from eagleray_serving.web import as_wire_error

MEDIA_TYPE = "text/event-stream"
# Proxies that hold an answer back until it is whole are told not to.
HEADERS = {"cache-control": "no-store", "x-accel-buffering": "no"}

Body = Mapping[str, Any]


def are_wanted(headers: Headers) -> bool:
    """Whether a client asks for events."""
    return MEDIA_TYPE in headers.get("accept", "").lower()


async def event_stream(
    grown: AsyncGenerator[Answers, None],
    timeout_s: float,
    *,
    shape: Callable[[Answers], Body],
    finish: Callable[[Answers], object],
    what: str,
) -> StreamingResponse:
    """Return an answer that is sent while it grows.

    Events without a name hold what is known so far; the last one is named `done` and holds the whole answer, or
    `error`. What fails before the first event is an answer of its own, with its status.

    Args:
        grown: The answer as it grows.
        timeout_s: Seconds for all of it.
        shape: The body of a whole answer.
        finish: Told the whole answer, once it is there.
        what: What is answered, for the log.

    Raises:
        WireError: There was no first event.
    """
    deadline_s = asyncio.get_running_loop().time() + timeout_s
    try:
        async with asyncio.timeout_at(deadline_s):
            first = await anext(grown)
    except TimeoutError:
        await grown.aclose()
        raise timed_out(timeout_s) from None
    if isinstance(failed := first.items[0], ItemFailure):
        await grown.aclose()
        raise failed.as_error()

    async def events() -> AsyncIterator[str]:
        try:
            async with aclosing(grown), asyncio.timeout_at(deadline_s):
                async for answers in _from(first, grown):
                    (item,) = answers.items
                    if isinstance(item, ItemFailure):
                        raise item.as_error()
                    if not answers.is_whole:
                        yield _event(item)
                        continue
                    finish(answers)
                    yield _event(shape(answers), "done")
        except TimeoutError:
            yield _event(timed_out(timeout_s).body(), "error")
        except Exception as error:
            yield _event(as_wire_error(error, what).body(), "error")

    return StreamingResponse(events(), media_type=MEDIA_TYPE, headers=HEADERS)


def timed_out(timeout_s: float) -> WireError:
    """Return the answer to a request whose time is over."""
    return WireError(
        503,
        "timeout",
        f"the model did not answer within {timeout_s:g} s",
        "try again, with fewer items",
        retry_after_s=1,
    )


async def _from(first: Answers, rest: AsyncIterator[Answers]) -> AsyncIterator[Answers]:
    yield first
    async for answers in rest:
        yield answers


def _event(body: Body, name: str | None = None) -> str:
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(body, ensure_ascii=False)}\n\n"
