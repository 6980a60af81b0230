"""What the server says about itself: the OpenAPI document, and a page rendered from it that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from eagleray_serving.catalog import ModelCard
from eagleray_serving.schema import ANSWERS, REQUESTS, ErrorAnswer, Verb

COMPONENT = "#/components/schemas/{model}"
EXAMPLES: Mapping[Verb, Any] = {
    "translate": {"text": "6 July 2011"},
    "classify": {"text": "Good morning"},
    "predict": {"inputs": [{"column": "value"}]},
}
STATUSES = {
    "400": "Malformed JSON, or several models could answer.",
    "404": "No such model or path.",
    "405": "No such method here.",
    "408": "The body did not arrive in time.",
    "413": "The body, an item or the number of items is too large.",
    "415": "The body is not application/json.",
    "422": "JSON, but no request.",
    "429": "Too much is waiting; Retry-After says when to try again.",
    "503": "No model answered in time; Retry-After says when to try again.",
}
PAGES = {
    "/healthz": "Whether the server lives.",
    "/readyz": "Whether every model answers.",
    "/v1/models": "The models, with version and state.",
    "/openapi.json": "This document.",
    "/docs": "This page.",
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,pre{font:14px/1.4 ui-monospace,monospace;background:#f4f4f4;border-radius:4px}"
    "code{padding:.1em .3em}pre{padding:.8em;overflow:auto}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3em .8em .3em 0;vertical-align:top}"
    "h2{margin-top:2em;border-bottom:1px solid #ddd}"
)


def openapi_document(cards: Sequence[ModelCard]) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document of a server with these models."""
    models: list[type[BaseModel]] = [*REQUESTS.values(), *ANSWERS.values(), ErrorAnswer]
    _, schemas = models_json_schema([(model, "validation") for model in models], ref_template=COMPONENT)
    paths: dict[str, Any] = {path: {"get": _page(summary)} for path, summary in PAGES.items()}
    for verb in sorted({card.verb for card in cards}):
        names = [card.name for card in cards if card.verb == verb]
        paths[f"/v1/{verb}"] = {"post": _operation(verb, f"Any of {', '.join(names)}")}
    for card in cards:
        pair = f", {card.source} to {card.target}" if card.source else ""
        paths[card.path] = {"post": _operation(card.verb, f"{card.ref}{pair}")}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Eagleray", "version": version("eagleray")},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def docs_page(document: Mapping[str, Any]) -> str:
    """Render an OpenAPI document as one page without scripts, fonts or anything else from elsewhere."""
    sections = [
        _section(path, method, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    title = f"{document['info']['title']} {document['info']['version']}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{_text(title)}</title>'
        f"<style>{STYLE}</style><h1>{_text(title)}</h1>{''.join(sections)}"
        f"<h2>Schemas</h2><pre>{_text(_pretty(document['components']['schemas']))}</pre></html>"
    )


def _page(summary: str) -> dict[str, Any]:
    return {"summary": summary, "responses": {"200": {"description": summary}}}


def _operation(verb: Verb, summary: str) -> dict[str, Any]:
    error = {"application/json": {"schema": _reference("ErrorAnswer")}}
    answer = {"application/json": {"schema": _reference(ANSWERS[verb].__name__)}}
    request = {"application/json": {"schema": _reference(REQUESTS[verb].__name__), "example": EXAMPLES[verb]}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": request},
        "responses": {
            "200": {"description": "An answer per item, in order.", "content": answer},
            **{status: {"description": text, "content": error} for status, text in STATUSES.items()},
        },
    }


def _reference(model: str) -> dict[str, str]:
    return {"$ref": COMPONENT.format(model=model)}


def _section(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [
        f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation['summary'])}</p>",
    ]
    if "requestBody" in operation:
        example = operation["requestBody"]["content"]["application/json"]["example"]
        parts.append(f"<pre>{_text(_pretty(example))}</pre>")
    rows = "".join(
        f"<tr><td><code>{status}</code></td><td>{_text(response['description'])}</td></tr>"
        for status, response in operation["responses"].items()
    )
    return "".join(parts) + f"<table>{rows}</table>"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _text(value: str) -> str:
    return html.escape(value)
