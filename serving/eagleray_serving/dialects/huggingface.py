"""Hugging Face's inference API: `InferenceClient(model="http://host:8000/models/<name>")`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from eagleray_serving.catalog import ModelCard
from eagleray_serving.dialects.languages import same_language
from eagleray_serving.dialects.models import Models
from eagleray_serving.dialects.shapes import sentence, text_list
from eagleray_serving.schema import WireError, parse_json

GENERATION = ("num_beams", "max_new_tokens")


def routes(models: Models) -> Sequence[BaseRoute]:
    """Return the dialect's routes."""

    async def infer(request: Request) -> Any:
        card = models.find(request.path_params["name"])
        if card.inputs == "inputs":
            raise WireError(400, "not_supported", f"{card.name} has a task of its own", f"ask it at {card.path}")
        body = await models.read(request)
        if card.inputs == "images":
            return _labels((await models.classify_images(request, card, [body])).items[0], None)
        fields = parse_json(body)
        _refuse_others(fields, {"inputs", "parameters", "options"})
        parameters = fields.get("parameters") or {}
        if not isinstance(parameters, Mapping):
            raise WireError(422, "invalid_request", "parameters must be an object")
        texts = text_list(fields.get("inputs"), "inputs")
        if card.verb == "translate":
            answer = await models.translate(request, card, texts, _options(card, parameters))
            return [{"translation_text": item["text"]} for item in answer.items]
        _refuse_others(parameters, {"top_k", "function_to_apply"})
        top_k = _top_k(parameters)
        return [_labels(item, top_k) for item in (await models.classify(request, card, texts)).items]

    path = "/models/{name}"
    return [Route(path, models.answering(infer, lambda error: {"error": sentence(error)}), methods=["POST"])]


def _labels(item: Mapping[str, Any], top_k: int | None) -> list[dict[str, Any]]:
    ordered = sorted(item["scores"].items(), key=lambda pair: -pair[1])[:top_k]
    return [{"label": label, "score": score} for label, score in ordered]


def _options(card: ModelCard, parameters: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_others(
        parameters, {"src_lang", "tgt_lang", "truncation", "clean_up_tokenization_spaces", "generate_parameters"}
    )
    for name, has in (("src_lang", card.source), ("tgt_lang", card.target)):
        wanted = parameters.get(name)
        if wanted is not None and not (isinstance(wanted, str) and same_language(wanted, has)):
            raise WireError(
                400, "no_such_pair", f"{card.name} translates {card.source} to {card.target}", f"leave {name} out"
            )
    generation = parameters.get("generate_parameters") or {}
    if not isinstance(generation, Mapping):
        raise WireError(422, "invalid_request", "generate_parameters must be an object")
    _refuse_others(generation, set(GENERATION))
    return dict(generation)


def _top_k(parameters: Mapping[str, Any]) -> int | None:
    if parameters.get("function_to_apply") not in (None, "softmax"):
        raise WireError(422, "invalid_request", "function_to_apply can only be softmax")
    top_k = parameters.get("top_k")
    if top_k is not None and (not isinstance(top_k, int) or isinstance(top_k, bool) or top_k < 1):
        raise WireError(422, "invalid_request", "top_k must be a whole number above 0")
    return top_k


def _refuse_others(fields: Mapping[str, Any], known: set[str]) -> None:
    """Refuse what would be ignored.

    Raises:
        WireError: 422.
    """
    if others := sorted(name[:40] for name in set(fields) - known):
        raise WireError(
            422, "invalid_request", f"{', '.join(others)}: not supported", f"there are {', '.join(sorted(known))}"
        )
