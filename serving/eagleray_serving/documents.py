"""What the server says about itself: the OpenAPI document, and a page rendered from it that needs no network."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

from eagleray_serving.events import MEDIA_TYPE
from eagleray_serving.gate import OPEN_PATHS
from eagleray_serving.schema import ANSWERS, REQUESTS, ErrorAnswer, Verb

EXAMPLES: Mapping[Verb, Any] = {
    "translate": {"text": "6 July 2011"},
    "classify": {"text": "Good morning"},
    "predict": {"inputs": [{"column": "value"}]},
}
STATUSES: Mapping[int | str, str] = {
    400: "Malformed JSON, or several models could answer.",
    401: "A key is needed, or this one is not known.",
    403: "The key may not use this model.",
    404: "No such model or path.",
    405: "No such method here.",
    408: "The body did not arrive in time.",
    413: "The body, an item or the number of items is too large.",
    414: "The URL is too long.",
    415: "The body is not application/json.",
    422: "JSON, but no request.",
    429: "Too much is waiting, or the key has used its tokens; Retry-After says when to try again.",
    431: "The headers are too large.",
    503: "No model answered in time; Retry-After says when to try again.",
}
PAGES = {
    "/healthz": "Whether the server lives.",
    "/readyz": "Whether every model answers.",
    "/v1/models": "The models, with version, limits, scores and state.",
    "/metrics": "What was counted, for Prometheus.",
    "/docs": "This page.",
    "/": "Where to begin; for a browser, a page to try the models on.",
}
STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:52rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,pre{font:14px/1.4 ui-monospace,monospace;background:#f4f4f4;border-radius:4px}"
    "code{padding:.1em .3em}pre{padding:.8em;overflow:auto}"
    "table{border-collapse:collapse;width:100%}td,th{text-align:left;padding:.3em .8em .3em 0;vertical-align:top}"
    "h2{margin-top:2em;border-bottom:1px solid #ddd}"
)


def operation(verb: Verb, summary: str) -> dict[str, Any]:
    """Return what FastAPI is told about a route whose body it does not parse itself."""
    body = {"schema": REQUESTS[verb].model_json_schema(), "example": EXAMPLES[verb]}
    errors = {status: {"description": text, "model": ErrorAnswer} for status, text in STATUSES.items()}
    answer: dict[str, Any] = {"description": "An answer per item, in order.", "model": ANSWERS[verb]}
    if verb == "translate":
        answer["content"] = {MEDIA_TYPE: {"schema": {"type": "string"}}}
    return {
        "summary": summary,
        "responses": {200: answer, **errors},
        "openapi_extra": {"requestBody": {"required": True, "content": {"application/json": body}}},
    }


def demand_key(document: dict[str, Any]) -> None:
    """Write into an OpenAPI document that a key is needed, and where."""
    document["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "A key; eagleray keys add NAME makes one."}
    }
    for path, methods in document["paths"].items():
        for operation in methods.values():
            operation["security"] = [] if path in OPEN_PATHS else [{"key": []}]


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


def _section(path: str, method: str, operation: Mapping[str, Any]) -> str:
    parts = [
        f"<h2><code>{method.upper()} {_text(path)}</code></h2><p>{_text(operation['summary'])}</p>",
    ]
    if "requestBody" in operation:
        example = operation["requestBody"]["content"]["application/json"]["example"]
        parts.append(f"<pre>{_text(_pretty(example))}</pre>")
    if operation.get("security"):
        parts.append("<p>Needs a key: <code>Authorization: Bearer KEY</code>.</p>")
    rows = "".join(
        f"<tr><td><code>{status}</code></td><td>{_text(response['description'])}</td></tr>"
        for status, response in operation["responses"].items()
    )
    return "".join(parts) + f"<table>{rows}</table>"


def _pretty(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False)


def _text(value: str) -> str:
    return html.escape(value)
