"""The application at `/`, and which model a bare route means."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from serving_fakes import (
    DIGITS,
    EN_DE,
    EN_FR,
    LANGID,
    OWN,
    FakeFleet,
    bulk_service,
    call,
    is_error,
    service,
)

from eagleray_serving.catalog import ModelCard, choose, route_prefixes
from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.keys import KeyFile, new_key
from eagleray_serving.protection import Protection
from eagleray_serving.schema import WireError
from eagleray_serving.web import whole_path

ALL = (EN_FR, EN_DE, LANGID, DIGITS, OWN)


def edge(*cards: ModelCard, states: dict[str, str] | None = None) -> FastAPI:
    fleet = FakeFleet({card.name: service(card) for card in cards}, states)
    bulk = {card.name: bulk_service(card) for card in cards}
    return Edge(cards, fleet, max_body_bytes=1000, body_timeout_s=1, bulk=bulk).application()


def test_the_edge_is_light_and_so_is_whoever_deploys_a_replica() -> None:
    code = "import sys, eagleray_serving.deployments, eagleray_serving.replica; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_replica_does_without_torch_compile_which_pipelines_bring_along() -> None:
    code = "import sys, eagleray_serving.version_loading; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_only_model_of_a_verb_stands_at_the_bare_route() -> None:
    assert route_prefixes([EN_FR, LANGID]) == {"en-fr": "/v1/translate", "langid": "/v1/classify"}
    assert route_prefixes([EN_FR, EN_DE]) == {"en-fr": "/v1/translate/en-fr", "en-de": "/v1/translate/en-de"}


@pytest.mark.parametrize(
    "cards, verb, body, chosen",
    [
        ([EN_FR, LANGID], "translate", {}, "en-fr"),
        ([EN_FR, EN_DE], "translate", {"model": "en-de"}, "en-de"),
        ([EN_FR, EN_DE], "translate", {"target": "de"}, "en-de"),
        ([EN_FR, EN_DE], "translate", {"source": "en", "target": "fr"}, "en-fr"),
        ([LANGID, DIGITS], "classify", {"text": "a"}, "langid"),
        ([LANGID, DIGITS], "classify", {"images": ["a"]}, "digits"),
        ([EN_FR, EN_DE], "translate", {}, 400),
        ([EN_FR, EN_DE], "translate", {"source": "en"}, 400),
        ([EN_FR, EN_DE], "translate", {"target": "es"}, 400),
        ([EN_FR, EN_DE], "translate", {"model": "langid"}, 404),
        ([EN_FR], "classify", {"text": "a"}, 404),
        ([], "predict", {}, 404),
    ],
)
def test_a_bare_route_means_one_model_or_says_which_there_are(
    cards: list[ModelCard], verb: Any, body: dict[str, Any], chosen: str | int
) -> None:
    try:
        found: str | int = choose(cards, verb, body).name
    except WireError as error:
        found = error.status
    assert found == chosen


def test_an_ambiguous_request_lists_the_models() -> None:
    response = call(edge(EN_FR, EN_DE), "POST", "/v1/translate", b'{"text": "a"}')
    assert response.status_code == 400
    assert response.json()["error"]["hint"] == "set model to one of en-fr (en to fr), en-de (en to de)"


def test_a_bare_route_hands_the_request_on_to_the_chosen_model() -> None:
    response = call(edge(EN_FR, EN_DE), "POST", "/v1/translate", b'{"text": "a", "target": "de"}')
    assert response.json() == {"model": "en-de", "version": EN_DE.version, "translations": [{"text": "A"}]}


def test_health_readiness_and_the_list_of_models() -> None:
    app = edge(EN_FR, LANGID)
    assert call(app, "GET", "/healthz").json() == {"status": "ok"}
    assert call(app, "GET", "/readyz").json() == {
        "status": "ready",
        "models": {"en-fr": "ready", "langid": "ready"},
    }
    first = call(app, "GET", "/v1/models").json()["models"][0]
    assert first["ref"] == "en-fr@r1-step-00001200"
    assert (first["path"], first["source"], first["state"]) == ("/v1/translate/en-fr", "en", "ready")
    assert first["replicas"] == {"running": 1, "starting": 0}


def test_a_server_with_a_model_that_is_not_ready_is_503_and_names_it() -> None:
    response = call(edge(EN_FR, LANGID, states={"en-fr": "ready"}), "GET", "/readyz")
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert "langid (missing)" in response.json()["error"]["message"]


def test_the_documents_name_every_route_and_load_nothing() -> None:
    app = edge(*ALL)
    document = call(app, "GET", "/openapi.json").json()
    assert {card.path for card in ALL} | {card.bare_path for card in ALL} <= set(document["paths"])
    page = call(app, "GET", "/docs")
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "/v1/translate/en-fr" in page.text
    assert not any(mark in page.text for mark in ("<script", "<link", "src=", "http://", "https://"))


def test_the_documents_of_a_server_with_keys_say_so(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    key, kept = new_key("one", ["translate"])
    file.add(kept)
    fleet = FakeFleet({EN_FR.name: service(EN_FR)})
    gate = Gate(Protection(keys=str(file.path)))
    app = Edge([EN_FR], fleet, max_body_bytes=1000, body_timeout_s=1, gate=gate).application()
    bearer = {"authorization": f"Bearer {key}"}
    document = call(app, "GET", "/openapi.json", headers=bearer).json()
    assert document["components"]["securitySchemes"]["key"]["scheme"] == "bearer"
    needs = {path: bool(next(iter(methods.values()))["security"]) for path, methods in document["paths"].items()}
    assert {path for path, needed in needs.items() if not needed} == {"/", "/healthz", "/readyz"}
    assert {"401", "403", "429"} <= set(document["paths"]["/v1/translate"]["post"]["responses"])
    assert "Authorization: Bearer KEY" in call(app, "GET", "/docs", headers=bearer).text
    assert "securitySchemes" not in call(edge(EN_FR), "GET", "/openapi.json").json()["components"]


def test_every_reference_of_the_openapi_document_leads_somewhere() -> None:
    document = call(edge(*ALL), "GET", "/openapi.json").json()
    references: set[str] = set()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            references.update({value["$ref"]} if isinstance(value.get("$ref"), str) else ())
            for child in value.values():
                walk(child)
        elif isinstance(value, list):
            for child in value:
                walk(child)

    walk(document)
    names = {reference.removeprefix("#/components/schemas/") for reference in references}
    assert names and names <= set(document["components"]["schemas"])


@pytest.mark.parametrize(
    "path", ["/nothing", "/v1", "/v1/translate/other", "/v1/predict", "/v9/translate", "/../etc"]
)
def test_an_unknown_path_is_404_in_the_error_shape(path: str) -> None:
    response = call(edge(EN_FR), "POST" if "v1/" in path else "GET", path, b"{}")
    assert (response.status_code, is_error(response)) == (404, True)


def test_a_fault_of_the_edge_is_500_in_the_error_shape_without_its_text() -> None:
    class BrokenFleet(FakeFleet):
        async def states(self) -> Mapping[str, str]:
            raise RuntimeError("secret detail")

    app = Edge([EN_FR], BrokenFleet({}), max_body_bytes=10, body_timeout_s=1).application()
    response = call(app, "GET", "/readyz")
    assert (response.status_code, is_error(response), b"secret" in response.content) == (500, True, False)


def test_head_is_get_without_a_body() -> None:
    response = call(edge(EN_FR), "HEAD", "/healthz")
    assert (response.status_code, response.content) == (200, b"")


@pytest.mark.parametrize(
    "path, root, whole",
    [
        ("/v1/translate", "/v1/translate", "/v1/translate"),
        ("/v1/translate/", "", "/v1/translate"),
        ("/en-fr", "/v1/translate", "/v1/translate/en-fr"),
        ("/v1/translate/en-fr", "/v1/translate", "/v1/translate/en-fr"),
        ("/", "/v1/translate", "/v1/translate"),
        ("", "/v1/translate", "/v1/translate"),
        ("/", "", "/"),
        ("/v1/translated", "/v1/translate", "/v1/translate/v1/translated"),
    ],
)
def test_the_whole_path_is_the_same_behind_every_front(path: str, root: str, whole: str) -> None:
    assert whole_path({"path": path, "root_path": root}) == whole


def test_a_body_that_stalls_is_408() -> None:
    async def go() -> int:
        async def stall() -> dict[str, Any]:
            await asyncio.sleep(10)
            raise AssertionError

        sent: list[Any] = []

        async def send(message: Any) -> None:
            sent.append(message)

        app = service(EN_FR, request_timeout_s=0.02).application()
        await app({"type": "http", "method": "POST", "path": "/v1/translate", "headers": []}, stall, send)
        return int(sent[0]["status"])

    assert asyncio.run(go()) == 408
