"""Fakes of a loaded model and of a fleet, and a client that talks to an application in process."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import httpx
from starlette.responses import Response
from starlette.types import ASGIApp

from eagleray.config.schema import ServeConfig
from eagleray_serving.answering import Answered, Answers, Asking, ItemFailure
from eagleray_serving.bulk_service import BulkService
from eagleray_serving.catalog import ModelCard
from eagleray_serving.edge import READY
from eagleray_serving.schema import WireError
from eagleray_serving.service import ModelService

EN_FR = ModelCard("en-fr", "r1-step-00001200", "translate", "text", "en", "fr")
EN_DE = ModelCard("en-de", "r1-step-00000300", "translate", "text", "en", "de")
LANGID = ModelCard("langid", "r2-step-00000010", "classify", "text")
DIGITS = ModelCard("digits", "r1-step-00000010", "classify", "images")
OWN = ModelCard("own", "r1-step-00000010", "predict", "inputs")


class FakeAnswerer:
    """Answers upper case; `bad` fails alone; records what it was asked."""

    def __init__(
        self,
        answer: Callable[[Any], Answered] | None = None,
        delay_s: float = 0.0,
        version: str = EN_FR.version,
    ) -> None:
        self.calls: list[tuple[list[Mapping[str, Any]], dict[str, Any]]] = []
        self._answer = answer or self._upper
        self._delay_s = delay_s
        self._version = version

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        self.calls.append((list(items), dict(options)))
        await asyncio.sleep(self._delay_s)
        return Answers(self._version, [self._answer(next(iter(item.values()))) for item in items])

    @staticmethod
    def _upper(value: Any) -> Answered:
        if value == "bad":
            return ItemFailure("bad_item", "it cannot be used", "send another")
        return {"text": str(value).upper()}


class GrowingAnswerer(FakeAnswerer):
    """Answers word by word; `ends` instead of its last word."""

    def __init__(self, ends: Exception | ItemFailure | None = None, at: int = 2, pause_s: float = 0.0) -> None:
        super().__init__()
        self._ends, self._at, self._pause_s = ends, at, pause_s
        self.was_closed = False

    async def stream(
        self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking
    ) -> AsyncGenerator[Answers, None]:
        words = str(item["text"]).upper().split()
        try:
            for count in range(1, len(words) + 1):
                await asyncio.sleep(self._pause_s)
                if self._ends is not None and count > self._at:
                    if isinstance(self._ends, Exception):
                        raise self._ends
                    yield Answers(self._version, [self._ends])
                    return
                is_whole = count == len(words)
                yield Answers(self._version, [{"text": " ".join(words[:count])}], 3, is_whole)
        finally:
            self.was_closed = True


class OverloadedAnswerer:
    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        raise WireError(429, "overloaded", "too much is waiting", "try again", retry_after_s=1.2)


class FakeFleet:
    def __init__(self, services: Mapping[str, ModelService], states: Mapping[str, str] | None = None) -> None:
        self._services = services
        self._states = states

    async def states(self) -> Mapping[str, str]:
        return dict.fromkeys(self._services, READY) if self._states is None else self._states

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: {"running": 1, "starting": 0} for name in self._services}

    async def hand_on(self, name: str, body: bytes, asking: Asking) -> Response:
        # As in another process: nothing of the caller's context is there.
        there = asyncio.get_running_loop().create_task(
            self._services[name].respond(body, asking), context=Context()
        )
        answer: Response = pickle.loads(pickle.dumps(await there))
        return answer


def bulk_service(
    card: ModelCard, answerer: Any = None, columns: Sequence[str] = ("text",), **limits: Any
) -> BulkService:
    """Large requests whose chunks a fake answers, as from another process."""
    answers = answerer or FakeAnswerer(version=card.version)

    async def ask(items: Any, options: Any, asking: Asking, waiting_tokens: int) -> Answers:
        found: Answers = await answers.answer(*pickle.loads(pickle.dumps((items, options, asking))))
        return found

    async def count_replicas() -> int:
        return 2

    return BulkService(card, columns, ServeConfig.model_validate(limits), ask, count_replicas)


def service(
    card: ModelCard, answerer: Any = None, columns: Sequence[str] = ("text",), **limits: Any
) -> ModelService:
    return ModelService(card, columns, answerer or FakeAnswerer(version=card.version), ServeConfig(**limits))


def call(
    app: ASGIApp, method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
) -> httpx.Response:
    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app, raise_app_exceptions=True)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(
                method, path, content=body, headers={"content-type": "application/json", **(headers or {})}
            )

    return asyncio.run(go())


def is_error(response: httpx.Response) -> bool:
    """Whether an answer has the one error shape and is small."""
    error = response.json()["error"]
    return set(error) == {"code", "message", "hint"} and len(response.content) < 2000


@dataclass(frozen=True)
class RawAnswer:
    status: int
    headers: Mapping[str, str]
    body: bytes


def raw_call(
    app: ASGIApp,
    method: str,
    raw_path: bytes,
    headers: Sequence[tuple[bytes, bytes]] = ((b"content-type", b"application/json"),),
    chunks: Sequence[bytes | None] = (b"",),
) -> RawAnswer:
    """Send what no well-behaved client would, as uvicorn hands it on; a chunk that is None: the client is gone."""
    path, _, query = raw_path.partition(b"?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "scheme": "http",
        "method": method,
        "path": unquote(path.decode("latin-1")),
        "raw_path": path,
        "query_string": query,
        "root_path": "",
        "headers": list(headers),
        "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
    }
    sent: list[Any] = []

    async def go() -> None:
        arriving = iter(
            [
                {"type": "http.disconnect"}
                if chunk is None
                else {"type": "http.request", "body": chunk, "more_body": number < len(chunks) - 1}
                for number, chunk in enumerate(chunks)
            ]
        )

        async def receive() -> Any:
            return next(arriving, {"type": "http.disconnect"})

        async def send(message: Any) -> None:
            sent.append(message)

        await app(scope, receive, send)

    asyncio.run(go())
    named = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
    return RawAnswer(sent[0]["status"], named, b"".join(message.get("body", b"") for message in sent[1:]))
