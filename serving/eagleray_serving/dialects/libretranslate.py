"""LibreTranslate's API: `LibreTranslateAPI("http://host:8000/")`, and whatever else speaks it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from eagleray_serving.dialects.languages import language_name
from eagleray_serving.dialects.models import Models
from eagleray_serving.dialects.shapes import sentence, text_list, text_of
from eagleray_serving.schema import WireError

AUTO = "auto"


def routes(models: Models) -> Sequence[BaseRoute]:
    """Return the dialect's routes."""

    async def read(request: Request) -> dict[str, Any]:
        fields = await models.read_fields(request)
        key = fields.get("api_key")
        models.gate.identify(key if isinstance(key, str) and key else None)
        return fields

    async def translate(request: Request) -> Any:
        fields = await read(request)
        texts = text_list(fields.get("q"), "q")
        if fields.get("format", "text") != "text":
            raise WireError(400, "not_supported", "only the format text is supported")
        source = text_of(fields, "source") if fields.get("source") else AUTO
        card = await models.choose(
            request, None if source == AUTO else source, text_of(fields, "target"), texts[0]
        )
        found = [str(item["text"]) for item in (await models.translate(request, card, texts)).items]
        answer: dict[str, Any] = {"translatedText": found[0] if isinstance(fields["q"], str) else found}
        if source == AUTO:
            language = card.source or ""
            scores = await models.detect(request, texts[0]) or {language: 1.0}
            answer["detectedLanguage"] = {"language": language, "confidence": _percent(scores.get(language, 0.0))}
        return answer

    async def languages(request: Request) -> Any:
        targets: dict[str, list[str]] = defaultdict(list)
        for card in models.translators:
            assert card.source is not None and card.target is not None
            targets[card.source].append(card.target)
            targets[card.target].extend(())
        return [
            {"code": code, "name": language_name(code), "targets": sorted(set(found))}
            for code, found in sorted(targets.items())
        ]

    async def detect(request: Request) -> Any:
        scores = await models.detect(request, text_of(await read(request), "q"))
        if scores is None:
            raise WireError(
                404, "unknown_model", "no model that is served tells languages apart", "serve one, such as langid"
            )
        ordered = sorted(scores.items(), key=lambda pair: -pair[1])
        return [{"language": code, "confidence": _percent(score)} for code, score in ordered]

    def error_body(error: WireError) -> Mapping[str, Any]:
        return {"error": sentence(error)}

    return [
        Route("/translate", models.answering(translate, error_body), methods=["POST"]),
        Route("/languages", models.answering(languages, error_body), methods=["GET"]),
        Route("/detect", models.answering(detect, error_body), methods=["POST"]),
    ]


def _percent(score: float) -> float:
    return round(100 * score, 1)
