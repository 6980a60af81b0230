"""DeepL's API: `deepl.DeepLClient(key, server_url="http://host:8000")`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.routing import BaseRoute, Route

from eagleray_serving.dialects.languages import language_name
from eagleray_serving.dialects.models import Models
from eagleray_serving.dialects.shapes import sentence, text_list, text_of
from eagleray_serving.schema import WireError
from eagleray_serving.visits import current_visit

MAX_TEXTS = 50
# What DeepL itself says where an account has no limit.
UNLIMITED_CHARACTERS = 10**12
# Settings that would change the answer, and the only value of each that is what we do.
SETTINGS: Mapping[str, tuple[Any, ...]] = {
    "formality": (None, "default", "prefer_more", "prefer_less"),
    "glossary_id": (None, ""),
    "style_id": (None, ""),
    "tag_handling": (None, ""),
    "custom_instructions": (None, []),
}


def routes(models: Models) -> Sequence[BaseRoute]:
    """Return the dialect's routes."""
    num_characters: Counter[str] = Counter()  # by the name of the key, since this process began

    async def translate(request: Request) -> Any:
        fields = await models.read_fields(request)
        texts = text_list(fields.get("text"), "text")
        if len(texts) > MAX_TEXTS:
            raise WireError(413, "too_many_items", f"there are {len(texts)} texts; the limit is {MAX_TEXTS}")
        _check_settings(fields)
        source = fields.get("source_lang") or None
        if source is not None and not isinstance(source, str):
            raise WireError(422, "invalid_request", "source_lang must be a text")
        written = [text for text in texts if text.strip()]  # DeepL gives an empty text back as it is
        if not written:
            return {"translations": [_translation(text, text, source or "") for text in texts]}
        card = await models.choose(request, source, text_of(fields, "target_lang"), written[0])
        found = iter((await models.translate(request, card, written)).items)
        num_characters[_key_name()] += sum(map(len, written))
        done = [(text, str(next(found)["text"]) if text.strip() else text) for text in texts]
        return {"translations": [_translation(text, answer, card.source or "") for text, answer in done]}

    async def languages(request: Request) -> Any:
        fields: dict[str, Any] = dict(request.query_params)
        if request.headers.get("content-length", "0") != "0":  # DeepL's own client sends a form with GET
            fields |= await models.read_fields(request)
        is_target = fields.get("type") == "target"
        codes = {card.target if is_target else card.source for card in models.translators}
        return [
            {"language": code.upper(), "name": language_name(code), "supports_formality": False}
            for code in sorted(filter(None, codes))
        ]

    async def usage(request: Request) -> Any:
        return {"character_count": num_characters[_key_name()], "character_limit": UNLIMITED_CHARACTERS}

    def error_body(error: WireError) -> Mapping[str, Any]:
        return {"message": sentence(error)}

    return [
        Route("/v2/translate", models.answering(translate, error_body), methods=["POST"]),
        Route("/v2/languages", models.answering(languages, error_body), methods=["GET", "POST"]),
        Route("/v2/usage", models.answering(usage, error_body), methods=["GET", "POST"]),
    ]


def _translation(text: str, answer: str, source: str) -> dict[str, Any]:
    return {"detected_source_language": source.upper(), "text": answer, "billed_characters": len(text)}


def _check_settings(fields: Mapping[str, Any]) -> None:
    for name, values in SETTINGS.items():
        if fields.get(name) not in values:
            raise WireError(400, "not_supported", f"{name} is not supported", f"leave {name} out")


def _key_name() -> str:
    visit = current_visit()
    return "" if visit is None or visit.key is None else visit.key.name
