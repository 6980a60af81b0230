"""What one model does with a request: check it, answer its items, shape the answer. Knows no Ray."""

from __future__ import annotations

import asyncio
import io
import json
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from starlette.applications import Starlette
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eagleray.config.schema import ServeConfig
from eagleray_serving import events
from eagleray_serving.answering import Answered, Answerer, Answers, Asking, ItemFailure
from eagleray_serving.catalog import ModelCard, find
from eagleray_serving.chunks import is_large
from eagleray_serving.gate import Gate, signed
from eagleray_serving.lines import wants_lines
from eagleray_serving.reception import framing
from eagleray_serving.schema import (
    ANSWER_KEYS,
    Request,
    TranslateRequest,
    WireError,
    decode_image,
    error_body,
    input_kind,
    is_single,
    parse_request,
    raw_items,
)
from eagleray_serving.visits import Usage
from eagleray_serving.web import failure, read_body, request_id

# The images of one request have at most the pixels of so many of the largest: a few bytes can be a lot of work.
IMAGES_OF_MOST_PIXELS = 16
IMAGE_FORMATS = ("PNG", "JPEG")


class ModelResponse(JSONResponse):
    """A model's answer; crosses processes, and says there what it took."""

    usage: Usage


# Gives a body to the application that spreads it over all replicas; the flag asks for an answer in lines.
HandOver = Callable[[bytes, Asking, bool], Awaitable[Response]]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request that may be answered: checked, its items as the model takes them."""

    request: Request
    items: Sequence[Mapping[str, Any]]
    options: Mapping[str, Any]


class ModelService:
    """One model's routes.

    Args:
        card: The model.
        columns: The task's input columns.
        answerer: The loaded model.
        limits: The file's `serve` section.
        gate: What stands before the routes; asks nobody for a key by default.
        hand_over: Where large requests go; None: they are answered here, behind the small ones.
    """

    def __init__(
        self,
        card: ModelCard,
        columns: Sequence[str],
        answerer: Answerer,
        limits: ServeConfig,
        gate: Gate | None = None,
        hand_over: HandOver | None = None,
    ) -> None:
        self.card = card
        self.gate = gate or Gate(max_header_bytes=limits.max_header_bytes)
        self._columns = tuple(columns)
        self._answerer = answerer
        self._limits = limits
        self._hand_over = hand_over

    def application(self) -> Starlette:
        """Return the ASGI application: the bare and the named route."""
        paths = (self.card.bare_path, f"{self.card.bare_path}/{{model}}")
        return Starlette(
            routes=[Route(path, self._route, methods=["POST"]) for path in paths], **framing(self.gate)
        )

    async def respond(self, body: bytes, asking: Asking) -> Response:
        """Answer a whole body here; every failure becomes an answer."""
        return await self._respond(body, asking, None)

    def read(self, body: bytes) -> Asked:
        """Check a body.

        Raises:
            WireError: It is no request to this model.
        """
        request = parse_request(self.card.verb, body, self._limits)
        self._check_target(request)
        return Asked(request, self._items(request), _options(request))

    async def take(self, body: bytes) -> Asked:
        """Check a body without holding others up.

        Raises:
            WireError: It is no request to this model.
        """
        # Images are looked at off the event loop: a thousand headers hold everybody up.
        is_slow = self.card.inputs == "images"
        return await asyncio.to_thread(self.read, body) if is_slow else self.read(body)

    async def _respond(self, body: bytes, asking: Asking, hand_over: HandOver | None) -> Response:
        try:
            return await self._handle(body, asking, hand_over)
        except Exception as error:
            return failure(error, f"a request to {self.card.ref}")

    async def _route(self, http: HTTPRequest) -> Response:
        if "model" in http.path_params:
            find([self.card], http.path_params["model"])
        self.gate.admit(self.card.scope)
        body = await read_body(http, self._limits.max_body_bytes, self._limits.request_timeout_s)
        asking = signed(Asking(request_id(http)))
        if self.card.verb == "translate" and events.are_wanted(http.headers):
            return await self._stream(body, asking)
        if self._hand_over is not None and wants_lines(http.headers):
            return await self._hand_over(body, asking, True)
        return await self._respond(body, asking, self._hand_over)

    async def _handle(self, body: bytes, asking: Asking, hand_over: HandOver | None) -> Response:
        asked = await self.take(body)
        if is_large(asked.items, self._limits.bulk):
            if hand_over is not None:
                return await hand_over(body, asking, False)
            asking = replace(asking, lane="bulk")
        began = time.monotonic()
        answers = await self._answer(asked.items, asked.options, asking)
        usage = self._account(answers, asking, time.monotonic() - began)
        if is_single(asked.request) and isinstance(failed := answers.items[0], ItemFailure):
            raise failed.as_error()
        response = self._shape(answers)
        response.usage = usage
        return response

    async def _stream(self, body: bytes, asking: Asking) -> Response:
        """Send the translation of one text while it grows.

        Raises:
            WireError: The request is none, or there is no first event.
        """
        asked = self.read(body)
        if not is_single(asked.request):
            raise WireError(
                422, "invalid_request", "a list of texts is not sent as events", "send one text, or accept JSON"
            )
        began = time.monotonic()
        return await events.event_stream(
            self._answerer.stream(asked.items[0], asked.options, asking),
            self._limits.request_timeout_s,
            shape=self._body,
            finish=lambda answers: self._account(answers, asking, time.monotonic() - began),
            what=f"a stream of {self.card.ref}",
        )

    def _account(self, answers: Answers, asking: Asking, seconds: float) -> Usage:
        usage = Usage(self.card.name, answers.version, len(answers.items), answers.num_tokens, asking.lane)
        self.gate.metrics.count_answer(usage, seconds)
        self.gate.charge(usage, asking)
        return usage

    async def _answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        try:
            async with asyncio.timeout(self._limits.request_timeout_s):
                answers = await self._answerer.answer(items, options, asking)
        except TimeoutError:
            raise events.timed_out(self._limits.request_timeout_s) from None
        assert len(answers.items) == len(items), f"{len(answers.items)} answers to {len(items)} items"
        return answers

    def _check_target(self, request: Request) -> None:
        if request.model is not None:
            find([self.card], request.model)
        if input_kind(request) != self.card.inputs:
            raise WireError(
                422,
                "invalid_request",
                f"{self.card.name} answers {self.card.inputs}, not {input_kind(request)}",
                f"send {self.card.inputs}",
            )
        if not isinstance(request, TranslateRequest):
            return
        for key in ("source", "target"):
            wanted, has = getattr(request, key), getattr(self.card, key)
            if wanted is not None and has is not None and wanted != has:
                raise WireError(
                    400,
                    "no_such_pair",
                    f"{self.card.name} translates {self.card.source} to {self.card.target}",
                    f"leave {key} out, or choose another model: GET /v1/models",
                )

    def _items(self, request: Request) -> list[Mapping[str, Any]]:
        values = raw_items(request)
        if self.card.inputs == "images":
            return self._images(values)
        if self.card.inputs == "text":
            return [{self._columns[0]: value} for value in values]
        return [self._row(value, index) for index, value in enumerate(values)]

    def _images(self, texts: Sequence[str]) -> list[Mapping[str, Any]]:
        most, num_pixels = self._limits.max_image_pixels * IMAGES_OF_MOST_PIXELS, 0
        items: list[Mapping[str, Any]] = []
        for index, text in enumerate(texts):
            data = decode_image(text, index)
            num_pixels += check_image(data, index, self._limits.max_image_pixels)
            if num_pixels > most:
                raise WireError(
                    413,
                    "images_too_large",
                    f"the images up to images[{index}] have more than {most} pixels together",
                    "send several smaller requests",
                )
            items.append({self._columns[0]: data})
        return items

    def _row(self, value: Any, index: int) -> Mapping[str, Any]:
        if not isinstance(value, dict):
            if len(self._columns) == 1:
                return {self._columns[0]: value}
            value = {}
        row: Mapping[str, Any] = value
        missing = [column for column in self._columns if column not in row]
        if missing:
            raise WireError(
                422,
                "invalid_request",
                f"inputs[{index}] lacks {', '.join(missing)}",
                f"an input is an object with {', '.join(self._columns)}",
            )
        return row

    def _shape(self, answers: Answers) -> ModelResponse:
        body = self._body(answers)
        try:
            return ModelResponse(body)
        except (ValueError, TypeError):
            # One answer that JSON cannot carry must not take the others with it.
            key = ANSWER_KEYS[self.card.verb]
            return ModelResponse({**body, key: [_encodable(answer) for answer in body[key]]})

    def _body(self, answers: Answers) -> dict[str, Any]:
        head = {"model": self.card.name, "version": answers.version}
        return {**head, ANSWER_KEYS[self.card.verb]: [_plain(answer) for answer in answers.items]}


def check_image(data: bytes, index: int, max_pixels: int) -> int:
    """Refuse what is not a PNG or JPEG of a reasonable size, by its header alone: no pixel is decoded.

    Returns:
        Its pixels.

    Raises:
        WireError: 413, too many pixels; 422, no such image.
    """
    import warnings

    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit below is stricter
            with Image.open(io.BytesIO(data), formats=IMAGE_FORMATS) as image:
                width, height = image.size
    except Image.DecompressionBombError:
        width, height = max_pixels + 1, 1
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise WireError(
            422, "bad_image", f"images[{index}] is not a PNG or JPEG image", "send a whole PNG or JPEG file"
        ) from None
    if width * height > max_pixels:
        raise WireError(
            413,
            "image_too_large",
            f"images[{index}] has more than {max_pixels} pixels",
            "scale the image down, or raise serve.max_image_pixels",
        )
    return int(width * height)


def _options(request: Request) -> dict[str, Any]:
    if not isinstance(request, TranslateRequest):
        return {}
    options = {"num_beams": request.num_beams, "max_new_tokens": request.max_new_tokens}
    return {key: value for key, value in options.items() if value is not None}


def _plain(answer: Answered) -> Any:
    if isinstance(answer, ItemFailure):
        return error_body(answer.code, answer.message, answer.hint)
    return answer


def _encodable(answer: Any) -> Any:
    try:
        json.dumps(answer, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, TypeError) as error:
        return error_body("bad_answer", f"the task's answer is not JSON: {error}", "return plain JSON values")
    return answer
