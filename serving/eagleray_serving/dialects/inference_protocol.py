"""The Open Inference Protocol, version 2, in JSON: `tritonclient.http` without binary data, KServe's clients.

https://github.com/kserve/open-inference-protocol
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from eagleray_serving.catalog import ModelCard
from eagleray_serving.dialects.models import Answer, Models
from eagleray_serving.dialects.shapes import sentence
from eagleray_serving.schema import WireError, parse_json

READY = "ready"
# Name of the one input, by what a model takes.
INPUTS = {"text": "text", "images": "image"}


def routes(models: Models) -> Sequence[BaseRoute]:
    """Return the dialect's routes."""

    async def server(request: Request) -> Any:
        return {"name": "eagleray", "version": version("eagleray"), "extensions": []}

    async def live(request: Request) -> Any:
        return {"live": True}

    async def ready(request: Request) -> Any:
        for card in models.cards:
            await _require_ready(models, card)
        return {"ready": True}

    async def metadata(request: Request) -> Any:
        card = _served(models, request)
        return {
            "name": card.name,
            "versions": [card.version],
            "platform": "eagleray",
            "inputs": [{"name": INPUTS[card.inputs], "datatype": "BYTES", "shape": [-1]}],
            "outputs": [{"name": name, "datatype": kind, "shape": [-1]} for name, kind in _outputs(card).items()],
        }

    async def model_ready(request: Request) -> Any:
        card = _served(models, request)
        await _require_ready(models, card)
        return {"name": card.name, "ready": True}

    async def infer(request: Request) -> Any:
        card = _served(models, request)
        fields = parse_json(await models.read(request))
        items = _read_input(card, fields)
        if card.inputs == "images":
            answer = await models.classify_images(request, card, [_image(item) for item in items])
        elif card.verb == "translate":
            answer = await models.translate(request, card, items)
        else:
            answer = await models.classify(request, card, items)
        body = {"model_name": card.name, "model_version": answer.version, "outputs": _write(card, fields, answer)}
        return {**body, "id": fields["id"]} if isinstance(fields.get("id"), str) else body

    def error_body(error: WireError) -> Mapping[str, Any]:
        return {"error": sentence(error)}

    gets = {
        "/v2": server,
        "/v2/health/live": live,
        "/v2/health/ready": ready,
        "/v2/models/{name}": metadata,
        "/v2/models/{name}/ready": model_ready,
        "/v2/models/{name}/versions/{version}": metadata,
        "/v2/models/{name}/versions/{version}/ready": model_ready,
    }
    posts = ("/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
    return [
        *(Route(path, models.answering(handle, error_body), methods=["GET"]) for path, handle in gets.items()),
        *(Route(path, models.answering(infer, error_body), methods=["POST"]) for path in posts),
    ]


def _served(models: Models, request: Request) -> ModelCard:
    card = models.find(request.path_params["name"])
    if card.inputs not in INPUTS:
        raise WireError(400, "not_supported", f"{card.name} has a task of its own", f"ask it at {card.path}")
    wanted = request.path_params.get("version")
    if wanted is not None and wanted != card.version:
        raise WireError(
            404, "unknown_version", f"{card.name} is served as {card.version}", "leave the version out"
        )
    return card


async def _require_ready(models: Models, card: ModelCard) -> None:
    state = await models.state(card)
    if state != READY:
        raise WireError(503, "not_ready", f"{card.name} is {state}", "ask again soon", retry_after_s=1)


def _outputs(card: ModelCard) -> dict[str, str]:
    """Return names and types of what a model answers for each item."""
    return {"translation": "BYTES"} if card.verb == "translate" else {"label": "BYTES", "score": "FP32"}


def _read_input(card: ModelCard, fields: Mapping[str, Any]) -> list[str]:
    """Return the items of the one input tensor.

    Raises:
        WireError: 400 or 422.
    """
    name, inputs = INPUTS[card.inputs], fields.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise WireError(422, "invalid_request", f"inputs must hold one tensor, {name}")
    tensor = inputs[0]
    if tensor.get("name") != name or tensor.get("datatype") != "BYTES":
        raise WireError(422, "invalid_request", f"the input must be named {name} and of datatype BYTES")
    if "binary_data_size" in (tensor.get("parameters") or {}):
        raise WireError(
            400, "not_supported", "binary tensor data is not supported", "send JSON: binary_data=False"
        )
    shape, data = tensor.get("shape"), _flatten(tensor.get("data"))
    if not data or not all(isinstance(item, str) for item in data):
        raise WireError(422, "invalid_request", f"the data of {name} must be texts")
    if not isinstance(shape, list) or _size(shape) != len(data):
        raise WireError(422, "invalid_request", f"the shape of {name} does not stand for {len(data)} items")
    return data


def _flatten(data: Any) -> list[Any]:
    if not isinstance(data, list):
        return []
    flat: list[Any] = []
    for item in data:
        flat.extend(item if isinstance(item, list) else [item])
    return flat


def _size(shape: Sequence[Any]) -> int:
    size = 1
    for length in shape:
        size *= length if isinstance(length, int) and not isinstance(length, bool) and length > 0 else 0
    return size


def _image(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise WireError(
            422, "invalid_request", "an image is not base64", "send PNG or JPEG files in base64"
        ) from None


def _write(card: ModelCard, fields: Mapping[str, Any], answer: Answer) -> list[dict[str, Any]]:
    """Return the tensors that were asked for, by default all."""
    known = _outputs(card)
    asked = fields.get("outputs") or [{"name": name} for name in known]
    if not isinstance(asked, list) or not all(
        isinstance(each, dict) and each.get("name") in known for each in asked
    ):
        raise WireError(422, "invalid_request", f"outputs can be {', '.join(known)}")
    columns = {name: [item["text" if name == "translation" else name] for item in answer.items] for name in known}
    return [
        {"name": name, "datatype": known[name], "shape": [len(answer.items)], "data": columns[name]}
        for name in (each["name"] for each in asked)
    ]
