"""A model's large requests at the edge: checked like small ones, answered by all replicas. Knows no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import Any, Protocol

from starlette.responses import Response

from eagleray.config.schema import ServeConfig
from eagleray_serving.answering import Answers, Asking
from eagleray_serving.bulk import Bulk, Item, Part, Window
from eagleray_serving.catalog import ModelCard
from eagleray_serving.chunks import BulkLimits, is_large
from eagleray_serving.gate import Gate, signed
from eagleray_serving.lines import LinesResponse
from eagleray_serving.schema import WireError
from eagleray_serving.service import ModelService
from eagleray_serving.visits import Usage
from eagleray_serving.web import failure

# Refusals of a chunk for so many times a request's own limit are the refusal of the whole.
PATIENCE = 5
ITEM_KEYS = ("text", "images", "inputs")


class AskModel(Protocol):
    """A way to some replica of one model."""

    async def __call__(
        self,
        items: Sequence[Item],
        options: Mapping[str, Any],
        asking: Asking,
        waiting_tokens: int,
    ) -> Answers:
        """Let one replica answer; see `bulk.Ask`."""


class BulkService:
    """One model's large requests.

    Args:
        card: The model.
        columns: The task's input columns.
        limits: The file's `serve` section.
        ask: The way to its replicas.
        count_replicas: Says how many of them run.
        gate: What asks whether a key may use the model, and charges it.
    """

    def __init__(
        self,
        card: ModelCard,
        columns: Sequence[str],
        limits: ServeConfig,
        ask: AskModel,
        count_replicas: Callable[[], Awaitable[int]],
        gate: Gate | None = None,
    ) -> None:
        self._card = card
        self._gate = gate or Gate(max_header_bytes=limits.max_header_bytes)
        self._limits = limits
        self._ask = ask
        self._window = Window(
            count_replicas,
            per_replica=limits.bulk.chunks_per_replica,
            max_requests=limits.bulk.max_requests,
        )
        whole = limits.model_copy(update={"request_timeout_s": limits.bulk.timeout_s})
        self._service = ModelService(card, columns, self, whole, self._gate)

    async def respond(self, body: bytes, asking: Asking, *, lines: bool) -> Response:
        """Answer a whole body, on request in lines; every failure becomes an answer, or the last line of one."""
        try:
            self._gate.admit(self._card.scope)
            asking = signed(asking)
            self._check_size(body)
            if not lines:
                return await self._service.respond(body, asking)
            asked = await self._service.take(body)
            if is_large(asked.items, self._limits.bulk):
                asking = replace(asking, lane="bulk")
            return await self._in_lines(self._bulk(asked.items, asked.options, asking), asking)
        except Exception as error:
            return failure(error, f"a bulk request to {self._card.ref}")

    def is_large(self, body: Mapping[str, Any]) -> bool:
        """Whether a body, not yet checked, is one for all replicas."""
        found: list[Any] = next((body[key] for key in ITEM_KEYS if isinstance(body.get(key), list)), [])
        return is_large(found, self._limits.bulk)

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        """Answer each item for itself, in order and by one version."""
        return await self._bulk(items, options, asking).whole()

    async def stream(
        self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking
    ) -> AsyncGenerator[Answers, None]:
        """Give the answer of one item at once: it grows where it is made, not here."""
        yield await self.answer([item], options, asking)

    def _bulk(self, items: Sequence[Item], options: Mapping[str, Any], asking: Asking) -> Bulk:
        bulk = self._limits.bulk
        call_timeout_s = self._limits.request_timeout_s
        limits = BulkLimits(bulk.chunk_tokens, bulk.chunk_items, call_timeout_s, PATIENCE * call_timeout_s)
        return Bulk(items, partial(self._ask_chunk, options, asking), self._window, limits)

    async def _ask_chunk(
        self, options: Mapping[str, Any], asking: Asking, items: Sequence[Item], waiting_tokens: int
    ) -> Answers:
        return await self._ask(items, options, asking, waiting_tokens)

    async def _in_lines(self, bulk: Bulk, asking: Asking) -> Response:
        parts = self._charged(self._timed(bulk.parts()), asking)
        first = await anext(parts)  # before the status is sent: what fails as a whole is an answer of its own
        return LinesResponse(self._card, first, parts)

    async def _charged(self, parts: AsyncGenerator[Part, None], asking: Asking) -> AsyncGenerator[Part, None]:
        """Account for each part when it is there: what a client that goes away was not given costs nothing."""
        began = time.monotonic()
        async with aclosing(parts):
            async for part in parts:
                version = part.version or self._card.version
                usage = Usage(self._card.name, version, len(part.items), part.num_tokens, asking.lane)
                self._gate.metrics.count_answer(usage, time.monotonic() - began)
                self._gate.charge(usage, asking)
                yield part

    async def _timed(self, parts: AsyncGenerator[Part, None]) -> AsyncGenerator[Part, None]:
        """Pass parts on until the time of a bulk request is over."""
        timeout_s = self._limits.bulk.timeout_s
        deadline = asyncio.get_running_loop().time() + timeout_s
        async with aclosing(parts):
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        part = await anext(parts, None)
                except TimeoutError:
                    raise WireError(
                        503,
                        "timeout",
                        f"the model did not answer within {timeout_s:g} s",
                        "send fewer items, or raise serve.bulk.timeout_s",
                        retry_after_s=1,
                    ) from None
                if part is None:
                    return
                yield part

    def _check_size(self, body: bytes) -> None:
        if len(body) > self._limits.max_body_bytes:
            raise WireError(
                413,
                "body_too_large",
                f"the body is larger than {self._limits.max_body_bytes} bytes",
                "send several smaller requests, or raise serve.max_body_bytes",
            )
