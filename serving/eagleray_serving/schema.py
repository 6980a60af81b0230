"""The wire contract: requests, answers and errors, and the only way in which a body becomes a request.

A body is parsed twice as strictly as JSON asks: no NaN, no Infinity, no number that overflows, no lone surrogate,
no deep nesting. What is not JSON is 400, what is JSON but no request is 422, what is too large is 413. No message
repeats the input.
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import ErrorDetails, from_json

from eagleray.config.schema import ServeConfig

Verb = Literal["translate", "classify", "predict"]
InputKind = Literal["text", "images", "inputs"]

MAX_NAME_CHARACTERS = 128
MAX_SHOWN_PROBLEMS = 3
MAX_SHOWN_CHARACTERS = 80


class WireError(Exception):
    """An answer other than 200, in the shape `{"error": {"code", "message", "hint"}}`.

    Args:
        status: The HTTP status.
        code: A stable, machine-readable name.
        message: What is wrong, without the input.
        hint: What to do about it.
        retry_after_s: Seconds after which to try again (429 and 503).
        allow: Methods that the path has (405).
        challenge: How to authenticate (401).
    """

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        hint: str | None = None,
        *,
        retry_after_s: float | None = None,
        allow: tuple[str, ...] = (),
        challenge: str | None = None,
    ) -> None:
        super().__init__(status, code, message, hint)
        self.status = status
        self.code = code
        self.message = message
        self.hint = hint
        self.retry_after_s = retry_after_s
        self.allow = allow
        self.challenge = challenge

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_error, (*self.args, self.retry_after_s, self.allow, self.challenge))

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to this error."""
        headers = {}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.allow:
            headers["allow"] = ", ".join(self.allow)
        if self.challenge is not None:
            headers["www-authenticate"] = self.challenge
        return headers

    def body(self) -> dict[str, Any]:
        """Return the body that belongs to this error."""
        return error_body(self.code, self.message, self.hint)


def _rebuild_error(
    status: int,
    code: str,
    message: str,
    hint: str | None,
    retry_after_s: float | None,
    allow: tuple[str, ...],
    challenge: str | None,
) -> WireError:
    return WireError(status, code, message, hint, retry_after_s=retry_after_s, allow=allow, challenge=challenge)


def error_body(code: str, message: str, hint: str | None = None) -> dict[str, Any]:
    """Return an error in the one shape that every error has."""
    return {"error": {"code": code, "message": message, "hint": hint}}


def headers_too_large(max_header_bytes: int) -> WireError:
    """Return the answer to headers over the limit; the front gives it as well as the applications."""
    message = f"the request line and the headers are larger than {max_header_bytes} bytes"
    return WireError(431, "headers_too_large", message, "send fewer headers, or raise serve.max_header_bytes")


def url_too_long(max_header_bytes: int) -> WireError:
    """Return the answer to a path and query over the limit."""
    message = f"the URL is longer than {max_header_bytes} bytes"
    return WireError(414, "url_too_long", message, "send what is asked in the body")


class Wire(BaseModel):
    """A body: other keys are errors, nothing is converted."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _one_or_many(value: Any) -> str:
    return "many" if isinstance(value, list) else "one"


Text = Annotated[str, Field(min_length=1)]
OneOrMany = Annotated[
    Annotated[Text, Tag("one")] | Annotated[Annotated[list[Text], Field(min_length=1)], Tag("many")],
    Discriminator(_one_or_many),
]
ModelName = Annotated[str | None, Field(max_length=MAX_NAME_CHARACTERS, description="Name of the model.")]
Language = Annotated[str | None, Field(min_length=1, max_length=35, description="Language code, such as `fr`.")]


class TranslateRequest(Wire):
    """`POST /v1/translate`."""

    text: OneOrMany = Field(description="One text, or a list of texts.")
    model: ModelName = None
    source: Language = None
    target: Language = None
    num_beams: int | None = Field(None, ge=1, le=16, description="Beams of the search.")
    max_new_tokens: int | None = Field(None, ge=1, le=100_000, description="Longest translation, in tokens.")


class ClassifyRequest(Wire):
    """`POST /v1/classify`: exactly one of `text` and `images`."""

    text: OneOrMany | None = Field(None, description="One text, or a list of texts.")
    images: Annotated[list[Text], Field(min_length=1)] | None = Field(
        None, description="PNG or JPEG images in base64."
    )
    model: ModelName = None


class PredictRequest(Wire):
    """`POST /v1/predict/<model>`: a task of your own."""

    inputs: Annotated[list[Any], Field(min_length=1)] = Field(
        description="Items: objects with the task's input columns, or bare values where it has one column."
    )
    model: ModelName = None


class ErrorDetail(BaseModel):
    """What went wrong."""

    code: str = Field(description="Stable, machine-readable name.")
    message: str = Field(description="What happened.")
    hint: str | None = Field(description="What to do about it.")


class ErrorAnswer(BaseModel):
    """Every answer other than 200; also stands in the place of an item of a list that could not be answered."""

    error: ErrorDetail


class Translation(BaseModel):
    """One translated text."""

    text: str


class TranslateAnswer(BaseModel):
    """The translations, in the order of the request."""

    model: str
    version: str
    translations: list[Translation | ErrorAnswer]


class Prediction(BaseModel):
    """One classified item."""

    label: str
    score: float
    scores: dict[str, float]


class ClassifyAnswer(BaseModel):
    """The predictions, in the order of the request."""

    model: str
    version: str
    predictions: list[Prediction | ErrorAnswer]


class PredictAnswer(BaseModel):
    """What the task returns for each input, in the order of the request."""

    model: str
    version: str
    predictions: list[Any]


Request = TranslateRequest | ClassifyRequest | PredictRequest
REQUESTS: Mapping[Verb, type[TranslateRequest | ClassifyRequest | PredictRequest]] = {
    "translate": TranslateRequest,
    "classify": ClassifyRequest,
    "predict": PredictRequest,
}
ANSWERS: Mapping[Verb, type[BaseModel]] = {
    "translate": TranslateAnswer,
    "classify": ClassifyAnswer,
    "predict": PredictAnswer,
}
ANSWER_KEYS: Mapping[Verb, str] = {
    "translate": "translations",
    "classify": "predictions",
    "predict": "predictions",
}

_R = TypeVar("_R", bound=Wire)


def parse_json(body: bytes) -> dict[str, Any]:
    """Read a body that must be a JSON object.

    Raises:
        WireError: 400 for what is not JSON, 422 for JSON that is not an object.
    """
    try:
        value = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise WireError(
            400,
            "malformed_json",
            f"the body is not valid JSON: {error}",
            "send UTF-8 JSON without NaN, Infinity, lone surrogates or deep nesting",
        ) from None
    if not isinstance(value, dict):
        raise WireError(422, "invalid_request", f"the body is {_json_type(value)}; an object is needed")
    return value


def parse_request(verb: Verb, body: bytes, limits: ServeConfig) -> Request:
    """Read a body as the request of a route, within the limits of the model.

    Raises:
        WireError: 400, 413 or 422.
    """
    request = _validate(REQUESTS[verb], parse_json(body))
    if isinstance(request, ClassifyRequest) and (request.text is None) == (request.images is None):
        found = "neither" if request.text is None else "both"
        raise WireError(422, "invalid_request", f"set exactly one of text and images; found {found}")
    _check_size(request, limits)
    if isinstance(request, PredictRequest):
        _check_inputs(request.inputs, limits.max_depth)
    return request


def input_kind(request: Request) -> InputKind:
    """Return what a request carries."""
    if isinstance(request, PredictRequest):
        return "inputs"
    return "images" if isinstance(request, ClassifyRequest) and request.images is not None else "text"


def is_single(request: Request) -> bool:
    """Return whether a request holds one bare item, whose failure is the failure of the request."""
    return isinstance(request, TranslateRequest | ClassifyRequest) and isinstance(request.text, str)


def raw_items(request: Request) -> list[Any]:
    """Return the items of a request, in order."""
    if isinstance(request, PredictRequest):
        return request.inputs
    if isinstance(request, ClassifyRequest) and request.images is not None:
        return list(request.images)
    return [request.text] if isinstance(request.text, str) else list(request.text or ())


def decode_image(text: str, index: int) -> bytes:
    """Decode one image of a request.

    Raises:
        WireError: 422, not base64.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise WireError(
            422,
            "invalid_request",
            f"images[{index}] is not base64",
            "send the bytes of a PNG or JPEG file in standard base64, without a `data:` prefix or line breaks",
        ) from None


def _validate(model: type[_R], value: dict[str, Any]) -> _R:
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False, include_context=False)
        shown = "; ".join(_describe(problem) for problem in problems[:MAX_SHOWN_PROBLEMS])
        more = f"; and {len(problems) - MAX_SHOWN_PROBLEMS} more" if len(problems) > MAX_SHOWN_PROBLEMS else ""
        raise WireError(
            422, "invalid_request", shown + more, f"the keys are {', '.join(model.model_fields)}"
        ) from None


def _describe(problem: ErrorDetails) -> str:
    where = "".join(
        f"[{part}]" if isinstance(part, int) else f".{_shorten(part)}"
        for depth, part in enumerate(problem["loc"])
        if depth != 1 or part not in ("one", "many")  # the branch of the union is none of the client's business
    ).lstrip(".")
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    return f"{where}: {problem['msg'][0].lower()}{problem['msg'][1:]}"


def _check_size(request: Request, limits: ServeConfig) -> None:
    items = raw_items(request)
    if len(items) > limits.max_items:
        raise WireError(
            413,
            "too_many_items",
            f"the request has {len(items)} items; the limit is {limits.max_items}",
            "send several smaller requests",
        )
    if input_kind(request) != "text":
        return
    for index, item in enumerate(items):
        if len(item) > limits.max_item_characters:
            raise WireError(
                413,
                "text_too_long",
                f"text[{index}] has {len(item)} characters; the limit is {limits.max_item_characters}",
                "split the text",
            )


def _check_inputs(inputs: list[Any], max_depth: int) -> None:
    # Iterative and level by level, though the parser bounds the depth: a generator per level would be quadratic.
    level: list[Any] = inputs
    for _ in range(max_depth + 1):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise WireError(
        413,
        "too_deep",
        f"inputs: more than {max_depth} lists and objects lie inside one another",
        "send flatter inputs, or raise serve.max_depth",
    )


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, float) and not math.isfinite(value):
        raise WireError(422, "invalid_request", "inputs: a number is too large for a 64-bit float")
    if isinstance(value, list):
        return value
    return value.values() if isinstance(value, dict) else ()


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _shorten(text: str) -> str:
    return text if len(text) <= MAX_SHOWN_CHARACTERS else text[:MAX_SHOWN_CHARACTERS] + "..."
