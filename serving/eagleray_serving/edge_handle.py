"""A replica's way to the edge application, for requests that all replicas answer together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response, StreamingResponse

from eagleray_serving.answering import Asking
from eagleray_serving.plan import EDGE_APPLICATION, ModelPlan
from eagleray_serving.schema import WireError
from eagleray_serving.visits import Usage, current_visit

# What the edge sends through a handle: status and headers, then the body in pieces.
Head = tuple[int, list[tuple[str, str]]]


@dataclass(frozen=True, slots=True)
class Used:
    """The last piece: what was done for the request, for the account of the replica that it reached first."""

    usages: tuple[Usage, ...]


class EdgeHandle:
    """The edge application through Serve's handle: no HTTP, so that no key is asked for twice.

    Args:
        plan: The model of this replica.
    """

    def __init__(self, plan: ModelPlan) -> None:
        self._plan = plan
        self._handle: Any = None

    async def hand_over(self, body: bytes, asking: Asking, lines: bool) -> Response:
        """Let the edge answer a body.

        Raises:
            WireError: 503, it does not.
        """
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        try:
            handle = await self._find()
            pieces = handle.options(stream=True).spread.remote(self._plan.card.name, body, asking, lines)
            async with asyncio.timeout(self._plan.serve.bulk.timeout_s):
                status, headers = await anext(pieces)
            return StreamingResponse(_pass_on(pieces), status, dict(headers))
        except (RayError, RayServeException, TimeoutError):
            raise WireError(
                503, "unavailable", "the edge of the server did not answer", "try again", retry_after_s=1
            ) from None

    async def _find(self) -> Any:
        from ray import serve

        if self._handle is None:
            self._handle = await asyncio.to_thread(serve.get_app_handle, EDGE_APPLICATION)
        return self._handle


async def _pass_on(pieces: Any) -> AsyncGenerator[bytes, None]:
    try:
        async for piece in pieces:
            if not isinstance(piece, Used):
                yield piece
            elif (visit := current_visit()) is not None:
                visit.used += piece.usages
    finally:
        pieces.cancel()


async def in_pieces(response: Response) -> AsyncGenerator[Head | bytes, None]:
    """Yield a response as `EdgeHandle` reads it."""
    kept = [(name, value) for name, value in response.headers.items()]
    yield response.status_code, kept
    if isinstance(response, StreamingResponse):
        iterator: AsyncIterator[Any] = response.body_iterator  # type: ignore[assignment]
        try:
            async for piece in iterator:
                yield piece
        finally:
            close = getattr(response, "aclose", None)
            if close is not None:
                await close()
    else:
        yield bytes(response.body)
