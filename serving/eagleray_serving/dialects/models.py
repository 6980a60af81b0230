"""The models as a dialect asks them: by name or by languages, answers or an error."""

from __future__ import annotations

import base64
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from eagleray_serving.answering import Asking, ItemFailure
from eagleray_serving.bodies import LargeBodies
from eagleray_serving.catalog import ModelCard, find
from eagleray_serving.dialects.languages import is_language, same_language
from eagleray_serving.dialects.shapes import ErrorBody, Handler, note_version, version_header
from eagleray_serving.gate import Gate
from eagleray_serving.reception import route_of
from eagleray_serving.schema import ANSWER_KEYS, WireError, parse_json
from eagleray_serving.web import as_wire_error, read_body, request_id

FORM = "application/x-www-form-urlencoded"
MAX_FORM_FIELDS = 1000


States = Callable[[], Awaitable[Mapping[str, str]]]
"""Tells the state of each model by its name."""


class AnswerBody(Protocol):
    """Lets a model answer a body of `/v1`, one replica or, where it is large, all of them."""

    async def __call__(self, card: ModelCard, parsed: Mapping[str, Any], body: bytes, asking: Asking) -> Response:
        """Return the answer; `parsed` is what the body holds."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a model answered to all items of a request.

    Attributes:
        version: The version that answered.
        items: Its answers, in order.
    """

    version: str
    items: Sequence[Mapping[str, Any]]


class Models:
    """The models of a server.

    Args:
        cards: What they are.
        states: Tells what they are doing.
        answer_body: How they are asked.
        gate: What knows the keys.
        bodies: What bounds the large ones.
        max_body_bytes: Largest body.
        body_timeout_s: Seconds in which it must arrive.
    """

    def __init__(
        self,
        cards: Sequence[ModelCard],
        states: States,
        answer_body: AnswerBody,
        gate: Gate,
        bodies: LargeBodies,
        *,
        max_body_bytes: int,
        body_timeout_s: float,
    ) -> None:
        self.cards = tuple(cards)
        self.gate = gate
        self._states = states
        self._answer_body = answer_body
        self._bodies = bodies
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s

    @property
    def translators(self) -> tuple[ModelCard, ...]:
        """The models that translate between two known languages."""
        return tuple(card for card in self.cards if card.source is not None and card.target is not None)

    def answering(self, handle: Handler, error_body: ErrorBody) -> Callable[[Request], Awaitable[Response]]:
        """Return an endpoint that answers what a handler returns as JSON, and what it raises as the dialect does.

        Args:
            handle: Returns the body of the answer.
            error_body: The body of an error.
        """

        async def endpoint(request: Request) -> Response:
            try:
                with self._bodies.place(request):
                    body = await handle(request)
                return JSONResponse(body, headers=version_header(request))
            except Exception as raised:
                error = as_wire_error(raised, f"{request.method} {route_of(request.scope)}")
                return JSONResponse(error_body(error), error.status, error.headers())

        return endpoint

    def find(self, name: str) -> ModelCard:
        """Return the model of a name.

        Raises:
            WireError: 404, there is none.
        """
        return find(self.cards, name)

    async def state(self, card: ModelCard) -> str:
        """Return what a model is doing; `ready` is the good word."""
        return (await self._states()).get(card.name, "missing")

    async def read(self, request: Request) -> bytes:
        """Read a body of any kind.

        Raises:
            WireError: 408 or 413.
        """
        return await read_body(request, self._max_body_bytes, self._body_timeout_s, accepts=None)

    async def read_fields(self, request: Request) -> dict[str, Any]:
        """Read a body of JSON or of a form; a field of a form that stands several times is a list.

        Raises:
            WireError: 400, 408, 413, 415 or 422.
        """
        if not request.headers.get("content-type", "").lower().startswith(FORM):
            return parse_json(await read_body(request, self._max_body_bytes, self._body_timeout_s))
        body = await self.read(request)
        try:
            fields = parse_qs(
                body.decode(), keep_blank_values=True, max_num_fields=MAX_FORM_FIELDS, errors="strict"
            )
        except (ValueError, UnicodeDecodeError):
            raise WireError(400, "malformed_form", "the body is not a form in UTF-8") from None
        return {name: values[0] if len(values) == 1 else values for name, values in fields.items()}

    async def translate(
        self, request: Request, card: ModelCard, texts: Sequence[str], options: Mapping[str, Any] | None = None
    ) -> Answer:
        """Let a model translate texts.

        Raises:
            WireError: Not all of them can be.
        """
        return await self._ask(request, card, {"text": list(texts), **(options or {})})

    async def classify(self, request: Request, card: ModelCard, texts: Sequence[str]) -> Answer:
        """Let a model classify texts.

        Raises:
            WireError: Not all of them can be.
        """
        return await self._ask(request, card, {"text": list(texts)})

    async def classify_images(self, request: Request, card: ModelCard, images: Sequence[bytes]) -> Answer:
        """Let a model classify images.

        Raises:
            WireError: Not all of them can be.
        """
        return await self._ask(request, card, {"images": [base64.b64encode(image).decode() for image in images]})

    def between(self, source: str | None, target: str) -> list[ModelCard]:
        """Return the models that translate between two languages; None: from any one.

        Raises:
            WireError: 400, there is none.
        """
        found = [
            card
            for card in self.translators
            if same_language(target, card.target) and (source is None or same_language(source, card.source))
        ]
        if not found:
            pairs = ", ".join(f"{card.source} to {card.target}" for card in self.translators) or "none"
            raise WireError(
                400, "no_such_pair", "no model translates between these languages", f"there are {pairs}"
            )
        return found

    async def choose(self, request: Request, source: str | None, target: str, text: str) -> ModelCard:
        """Return the model for a text: the only one between the languages, else the one for the text's language.

        Raises:
            WireError: 400, none or several could be meant.
        """
        found = self.between(source, target)
        if len({card.source for card in found}) > 1:
            detected = await self.detect(request, text)
            if detected is not None:
                found = self.between(max(detected, key=detected.__getitem__), target)
        if len(found) > 1:
            listed = ", ".join(f"{card.name} ({card.source} to {card.target})" for card in found)
            raise WireError(400, "model_required", "several models could answer", f"there are {listed}")
        return found[0]

    async def detect(self, request: Request, text: str) -> dict[str, float] | None:
        """Return how likely a text is of each language; None: no model that is served tells languages apart."""
        for card in self.cards:
            if card.verb != "classify" or card.inputs != "text":
                continue
            (answer,) = (await self.classify(request, card, [text])).items
            scores: dict[str, float] = answer["scores"]
            if all(map(is_language, scores)):
                return scores
        return None

    async def _ask(self, request: Request, card: ModelCard, body: Mapping[str, Any]) -> Answer:
        encoded, asking = json.dumps(body).encode(), Asking(request_id(request))
        response = await self._answer_body(card, body, encoded, asking)
        answer = json.loads(bytes(response.body))
        if response.status_code != 200:
            raise _again(response, answer["error"])
        items = answer[ANSWER_KEYS[card.verb]]
        for item in items:
            if "error" in item:
                raise ItemFailure(**item["error"]).as_error()
        note_version(request, f"{card.name}@{answer['version']}")
        return Answer(answer["version"], items)


def _again(response: Response, error: Mapping[str, Any]) -> WireError:
    """Return the error that a model's answer holds, to be written in a dialect's own shape."""
    retry_after = response.headers.get("retry-after")
    return WireError(
        response.status_code,
        error["code"],
        error["message"],
        error["hint"],
        retry_after_s=None if retry_after is None else float(retry_after),
    )
