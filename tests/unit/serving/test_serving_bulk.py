"""Large requests at the edge: over all replicas, as one answer or in lines."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import httpx
import pytest
from serving_fakes import (
    EN_DE,
    EN_FR,
    OWN,
    FakeAnswerer,
    FakeFleet,
    OverloadedAnswerer,
    bulk_service,
    call,
    service,
)
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eagleray.config.schema import ServeConfig
from eagleray_serving.answering import Answers, Asking
from eagleray_serving.bulk_service import BulkService
from eagleray_serving.catalog import ModelCard
from eagleray_serving.edge import Edge
from eagleray_serving.edge_handle import in_pieces
from eagleray_serving.lines import wants_lines
from eagleray_serving.schema import WireError

LINES = {"accept": "application/x-ndjson"}
TEXTS = [f"sentence {number}" for number in range(1000)]
BODY = json.dumps({"text": TEXTS}).encode()


class Versions(FakeAnswerer):
    """Answers as another version from some call on; fails from some call on."""

    def __init__(self, second_from: int = 10**9, fails_from: int = 10**9) -> None:
        super().__init__()
        self._second_from, self._fails_from = second_from, fails_from

    async def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], asking: Asking
    ) -> Answers:
        number = len(self.calls) + 1
        answers = await super().answer(items, options, asking)
        if number >= self._fails_from:
            raise WireError(500, "broken", "it broke")
        return Answers("r2" if number >= self._second_from else "r1", answers.items)


def app(bulk: BulkService) -> Starlette:
    async def route(request: Request) -> Response:
        return await bulk.respond(await request.body(), Asking("id"), lines=wants_lines(request.headers))

    return Starlette(routes=[Route("/", route, methods=["POST"])])


def lines_of(response: httpx.Response) -> list[dict[str, Any]]:
    return [json.loads(line) for line in response.content.splitlines()]


def test_a_large_request_is_answered_in_chunks_and_in_order() -> None:
    answerer = FakeAnswerer()
    response = call(app(bulk_service(EN_FR, answerer)), "POST", "/", BODY)
    assert [each["text"] for each in response.json()["translations"]] == [text.upper() for text in TEXTS]
    assert response.json()["version"] == EN_FR.version
    sizes = [len(items) for items, _ in answerer.calls]
    assert sum(sizes) == 1000 and len(sizes) > 3 and max(sizes) <= ServeConfig().bulk.chunk_items


def test_options_reach_every_chunk() -> None:
    answerer = FakeAnswerer()
    call(app(bulk_service(EN_FR, answerer)), "POST", "/", json.dumps({"text": TEXTS, "num_beams": 3}).encode())
    assert len(answerer.calls) > 3 and all(options == {"num_beams": 3} for _, options in answerer.calls)


def test_lines_come_in_order_with_their_index_and_end_with_the_count() -> None:
    response = call(app(bulk_service(EN_FR)), "POST", "/", BODY, LINES)
    assert response.headers["content-type"] == "application/x-ndjson"
    *items, last = lines_of(response)
    assert [item["index"] for item in items] == list(range(1000))
    assert [item["translation"]["text"] for item in items] == [text.upper() for text in TEXTS]
    assert {item["version"] for item in items} == {EN_FR.version}
    assert last == {"model": "en-fr", "version": EN_FR.version, "count": 1000}


def test_a_failed_item_is_a_line_of_its_own() -> None:
    *items, last = lines_of(
        call(app(bulk_service(EN_FR)), "POST", "/", json.dumps({"text": ["a", "bad", "c"]}).encode(), LINES)
    )
    assert [sorted(item) for item in items] == [
        ["index", "translation", "version"],
        ["error", "index", "version"],
        ["index", "translation", "version"],
    ]
    assert (items[1]["error"]["code"], last["count"]) == ("bad_item", 3)


def test_an_answer_that_is_no_json_is_an_error_in_its_line() -> None:
    answerer = FakeAnswerer(answer=lambda value: {"score": float("nan")} if value == 1 else {"score": 1.0})
    bulk = bulk_service(OWN, answerer, columns=["value"])
    first, second, _ = lines_of(call(app(bulk), "POST", "/", b'{"inputs": [0, 1]}', LINES))
    assert (first["prediction"], second["error"]["code"]) == ({"score": 1.0}, "bad_answer")


def test_lines_name_the_version_of_each_where_it_changes_on_the_way() -> None:
    answerer = Versions(second_from=5)
    *items, last = lines_of(call(app(bulk_service(EN_FR, answerer)), "POST", "/", BODY, LINES))
    first = sum(len(items) for items, _ in answerer.calls[:4])
    assert last["versions"] == {"r1": first, "r2": 1000 - first} == Counter(item["version"] for item in items)
    assert last["version"] == ("r1" if first > 500 else "r2")


def test_a_whole_answer_names_one_version_that_made_all_of_it() -> None:
    answerer = Versions(second_from=5)
    response = call(app(bulk_service(EN_FR, answerer)), "POST", "/", BODY)
    assert (response.json()["version"], len(response.json()["translations"])) == ("r2", 1000)
    sizes = [len(items) for items, _ in answerer.calls]
    assert sum(sizes) == 1000 + sum(sizes[:4])


def test_what_fails_before_the_first_line_is_an_answer_of_its_own() -> None:
    response = call(app(bulk_service(EN_FR, Versions(fails_from=1))), "POST", "/", BODY, LINES)
    assert (response.status_code, response.json()["error"]["code"]) == (500, "broken")
    response = call(app(bulk_service(EN_FR)), "POST", "/", b'{"text": []}', LINES)
    assert (response.status_code, response.json()["error"]["code"]) == (422, "invalid_request")


def test_what_fails_on_the_way_is_the_last_line() -> None:
    *items, last = lines_of(call(app(bulk_service(EN_FR, Versions(fails_from=6))), "POST", "/", BODY, LINES))
    assert last["error"]["code"] == "broken" and "index" not in last
    assert [item["index"] for item in items] == list(range(len(items))) and len(items) >= 256


def test_a_refused_request_says_so_once_patience_is_over() -> None:
    bulk = bulk_service(EN_FR, OverloadedAnswerer(), request_timeout_s=0.1)
    response = call(app(bulk), "POST", "/", BODY)
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")


def test_the_time_of_a_bulk_request_is_its_own_limit() -> None:
    for headers in ({}, LINES):
        bulk = bulk_service(EN_FR, FakeAnswerer(delay_s=20), bulk={"timeout_s": 0.1})
        response = call(app(bulk), "POST", "/", BODY, headers)
        assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")


def test_a_body_over_the_limit_of_its_model_is_413() -> None:
    response = call(app(bulk_service(EN_FR, max_body_bytes=1000)), "POST", "/", BODY)
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


def test_a_client_that_goes_away_ends_the_chunks() -> None:
    answerer = FakeAnswerer(delay_s=0.01)

    async def go() -> int:
        response = await bulk_service(EN_FR, answerer).respond(BODY, Asking("id"), lines=True)

        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        await response({"type": "http"}, receive, send)
        num_calls = len(answerer.calls)
        await asyncio.sleep(0.1)
        return len(answerer.calls) - num_calls

    assert asyncio.run(go()) == 0


def test_a_response_travels_through_a_handle_in_pieces() -> None:
    async def go(lines: bool) -> tuple[Any, bytes]:
        response = await bulk_service(EN_FR).respond(BODY, Asking("id"), lines=lines)
        head, *body = [piece async for piece in in_pieces(response)]
        return head, b"".join(piece for piece in body if isinstance(piece, bytes))

    (status, headers), body = asyncio.run(go(False))
    assert (status, dict(headers)["content-type"]) == (200, "application/json")
    assert len(json.loads(body)["translations"]) == 1000
    (status, headers), body = asyncio.run(go(True))
    assert (status, len(body.splitlines())) == (200, 1001)


def handing_over(card: ModelCard) -> tuple[Starlette, list[bool]]:
    handed: list[bool] = []

    async def hand_over(body: bytes, asking: Asking, lines: bool) -> Response:
        handed.append(lines)
        return Response(b"from the edge")

    made = service(card, bulk={"min_items": 10, "min_tokens": 1000})
    made._hand_over = hand_over
    return made.application(), handed


@pytest.mark.parametrize(
    "text, headers, expected",
    [
        (["a"] * 10, {}, []),
        ("a " * 5000, {}, []),
        (["a"] * 11, {}, [False]),
        (["a " * 600] * 4, {}, [False]),
        (["a"], LINES, [True]),
    ],
)
def test_a_replica_hands_over_what_is_large(text: Any, headers: dict[str, str], expected: list[bool]) -> None:
    application, handed = handing_over(EN_FR)
    response = call(application, "POST", "/v1/translate", json.dumps({"text": text}).encode(), headers)
    assert (response.status_code, handed) == (200, expected)


def test_a_wrong_large_request_is_refused_where_it_arrives() -> None:
    application, handed = handing_over(EN_FR)
    body = json.dumps({"text": ["a"] * 20, "source": "es"}).encode()
    assert (call(application, "POST", "/v1/translate", body).status_code, handed) == (400, [])


def edge_of(*cards: ModelCard) -> tuple[Edge, dict[str, FakeAnswerer], dict[str, FakeAnswerer]]:
    small = {card.name: FakeAnswerer(version=card.version) for card in cards}
    large = {card.name: FakeAnswerer(version=card.version) for card in cards}
    fleet = FakeFleet({card.name: service(card, small[card.name]) for card in cards})
    bulk = {card.name: bulk_service(card, large[card.name]) for card in cards}
    return Edge(cards, fleet, max_body_bytes=10_000_000, body_timeout_s=1, bulk=bulk), small, large


@pytest.mark.parametrize(
    "texts, headers, is_spread",
    [
        (["a"] * 3, {}, False),
        (["a"] * 3, LINES, True),
        (["a"] * 300, {}, True),
        (["a" * 10_000] * 21, {}, True),
    ],
)
@pytest.mark.parametrize("path", ["/v1/translate", "/v1/translate/en-de"])
def test_the_edge_spreads_what_is_large_and_hands_on_what_is_small(
    path: str, texts: list[str], headers: dict[str, str], is_spread: bool
) -> None:
    edge, small, large = edge_of(EN_FR, EN_DE)
    body = json.dumps({"text": texts, "target": "de"}).encode()
    response = call(edge.application(), "POST", path, body, headers)
    assert response.status_code == 200
    assert (bool(small["en-de"].calls), bool(large["en-de"].calls)) == (not is_spread, is_spread)
    assert not small["en-fr"].calls and not large["en-fr"].calls


DIALECTS = {
    "/models/en-de": lambda texts: {"inputs": texts},
    "/translate": lambda texts: {"q": texts, "source": "en", "target": "de"},
    "/v2/models/en-de/infer": lambda texts: {
        "inputs": [{"name": "text", "datatype": "BYTES", "shape": [len(texts)], "data": texts}]
    },
}


@pytest.mark.parametrize(
    "texts, is_spread", [(["a"] * 3, False), (["a"] * 300, True), (["a" * 10_000] * 21, True)]
)
@pytest.mark.parametrize("path", DIALECTS)
def test_what_is_large_is_spread_whatever_client_sends_it(path: str, texts: list[str], is_spread: bool) -> None:
    edge, small, large = edge_of(EN_FR, EN_DE)
    response = call(edge.application(), "POST", path, json.dumps(DIALECTS[path](texts)).encode())
    assert response.status_code == 200 and response.text.count(texts[0].upper()) >= len(texts)
    assert (bool(small["en-de"].calls), bool(large["en-de"].calls)) == (not is_spread, is_spread)
    assert edge._bodies.num_held == 0


def test_large_bodies_of_other_clients_need_a_place_too() -> None:
    edge, _, _ = edge_of(EN_FR)
    edge._bodies.num_held = 16
    refused = call(edge.application(), "POST", "/models/en-fr", json.dumps({"inputs": "a" * 300_000}).encode())
    assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
    assert "large requests are held already" in refused.json()["error"]
    assert call(edge.application(), "POST", "/models/en-fr", b'{"inputs": "a"}').status_code == 200


def test_large_bodies_beyond_what_memory_holds_are_refused_before_they_are_read() -> None:
    edge, _, _ = edge_of(EN_FR)
    edge._bodies.num_held = 16
    application = edge.application()
    refused = call(application, "POST", "/v1/translate", json.dumps({"text": "a" * 300_000}).encode())
    assert (refused.status_code, "retry-after" in refused.headers) == (429, True)
    assert call(application, "POST", "/v1/translate", b'{"text": "a"}').status_code == 200
    assert edge._bodies.num_held == 16


@pytest.mark.parametrize(
    "accept, wanted",
    [("application/x-ndjson", True), ("text/html, Application/X-NDJSON;q=0.9", True), ("*/*", False), ("", False)],
)
def test_lines_are_for_those_who_ask(accept: str, wanted: bool) -> None:
    asked: Callable[[Any], bool] = wants_lines
    assert asked({"accept": accept}) == wanted
