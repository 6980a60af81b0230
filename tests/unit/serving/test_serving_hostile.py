"""Requests that no well-behaved client sends: each has its right answer in the error shape, and never a 500."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from serving_fakes import DIGITS, EN_DE, EN_FR, LANGID, OWN, FakeFleet, call, is_error, raw_call, service
from starlette.types import ASGIApp

from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate

MARK = "q7x9hostile"
TEXT = json.dumps({"text": MARK}).encode()
JSON = (b"content-type", b"application/json")
CARDS = (EN_FR, EN_DE, LANGID, DIGITS, OWN)
LARGE = 5000  # bytes; more than the limit of a body, and after four times that it is not read any more


def nested(depth: int, leaf: str = "1") -> bytes:
    """An input of a user's own task: lists and objects inside one another."""
    pairs = [("[", "]") if level % 2 else ('{"a":', "}") for level in range(depth)]
    opened, closed = "".join(pair[0] for pair in pairs), "".join(pair[1] for pair in reversed(pairs))
    return f'{{"inputs": [{opened}{leaf}{closed}]}}'.encode()


# Method, path, headers besides the content type, chunks of the body, expected status.
Row = tuple[str, bytes, Sequence[tuple[bytes, bytes]], Sequence[bytes | None], int]
ROWS: dict[str, Row] = {
    # Bodies as they arrive.
    "no body": ("POST", b"/v1/translate/en-fr", (), [b""], 400),
    "one byte at a time": ("POST", b"/v1/translate/en-fr", (), [bytes([b]) for b in TEXT], 200),
    "empty chunks": ("POST", b"/v1/translate/en-fr", (), [b"", TEXT[:5], b"", TEXT[5:], b""], 200),
    "client gone at once": ("POST", b"/v1/translate/en-fr", (), [None], 408),
    "client gone in the middle": ("POST", b"/v1/translate/en-fr", (), [TEXT[:5], None], 408),
    "too small a content-length": ("POST", b"/v1/translate/en-fr", [(b"content-length", b"1")], [TEXT], 200),
    "no number as content-length": ("POST", b"/v1/translate/en-fr", [(b"content-length", b"x")], [TEXT], 200),
    "negative content-length": ("POST", b"/v1/translate/en-fr", [(b"content-length", b"-1")], [TEXT], 200),
    "second request behind the first": ("POST", b"/v1/translate/en-fr", (), [TEXT + b"GET / HTTP/1.1\r\n"], 400),
    "too large": ("POST", b"/v1/translate/en-fr", (), [b"1" * LARGE], 413),
    "too large in chunks": ("POST", b"/v1/translate/en-fr", (), [b"1" * 100] * 50, 413),
    "much too large": ("POST", b"/v1/translate/en-fr", (), [b"1" * 1000] * 100, 413),
    "too large at the edge": ("POST", b"/v1/translate", (), [b"1" * LARGE], 413),
    "gzip": ("POST", b"/v1/translate/en-fr", [(b"content-encoding", b"gzip")], [b"\x1f\x8b\x08"], 415),
    "gzip bomb": ("POST", b"/v1/translate/en-fr", [(b"content-encoding", b"deflate, gzip")], [b"\x1f\x8b"], 415),
    "form": ("POST", b"/v1/translate/en-fr", [(b"content-type", b"multipart/form-data")], [TEXT], 415),
    "other charset": ("POST", b"/v1/translate/en-fr", [(b"content-type", b"text/json;charset=x")], [TEXT], 415),
    "bytes as media type": ("POST", b"/v1/translate/en-fr", [(b"content-type", b"\xff\xfe")], [TEXT], 415),
    # Bodies that are JSON.
    "lone surrogate": ("POST", b"/v1/translate/en-fr", (), [b'{"text": "' + MARK.encode() + b'\\udc00"}'], 400),
    "surrogate at the edge": ("POST", b"/v1/translate", (), [b'{"text": "\\ud800"}'], 400),
    "NaN at the edge": ("POST", b"/v1/translate", (), [b'{"text": NaN}'], 400),
    "1e400": ("POST", b"/v1/predict", (), [b'{"inputs": [1e400]}'], 422),
    "-1e400 deep inside": ("POST", b"/v1/predict", (), [nested(5, "-1e400")], 422),
    "as deep as allowed": ("POST", b"/v1/predict", (), [nested(8)], 200),
    "too deep": ("POST", b"/v1/predict", (), [nested(9)], 413),
    "more brackets than a body holds": ("POST", b"/v1/predict", (), [b'{"inputs": ' + b"[" * 2000], 413),
    "deeper than the parser goes": ("POST", b"/v1/predict", (), [b'{"inputs": ' + b"[" * 900], 400),
    "NUL in a text": ("POST", b"/v1/translate/en-fr", (), [b'{"text": "a\\u0000b"}'], 200),
    "NUL in a name": ("POST", b"/v1/translate", (), [b'{"text": "a", "model": "\\u0000"}'], 404),
    "too many characters": ("POST", b"/v1/translate/en-fr", (), [json.dumps({"text": "a" * 101}).encode()], 413),
    "too many items": ("POST", b"/v1/translate/en-fr", (), [json.dumps({"text": ["a"] * 6}).encode()], 413),
    "too many inputs": ("POST", b"/v1/predict", (), [json.dumps({"inputs": [1] * 6}).encode()], 413),
    "no items": ("POST", b"/v1/predict", (), [b'{"inputs": []}'], 422),
    "an object as items": ("POST", b"/v1/predict", (), [b'{"inputs": {}}'], 422),
    "the same key twice": ("POST", b"/v1/translate/en-fr", (), [b'{"text": 1, "text": "a"}'], 200),
    "a number as model at the edge": ("POST", b"/v1/translate", (), [b'{"text": "a", "model": 1e9}'], 400),
    "a list as language": ("POST", b"/v1/translate", (), [b'{"text": "a", "target": ["fr"]}'], 400),
    "an image that is none": ("POST", b"/v1/classify", (), [b'{"images": ["aGVsbG8="]}'], 422),
    "an image that is not base64": ("POST", b"/v1/classify", (), [b'{"images": ["\\u0000"]}'], 422),
    # Paths and methods.
    "another method": ("BREW", b"/v1/translate/en-fr", (), [b""], 405),
    "a very long method": ("A" * 900, b"/v1/translate/en-fr", (), [b""], 405),
    "GET with a body": ("GET", b"/v1/translate/en-fr", (), [TEXT], 405),
    "TRACE": ("TRACE", b"/healthz", (), [b""], 405),
    "a path upwards": ("GET", b"/v1/../../etc/passwd", (), [b""], 404),
    "an encoded path upwards": ("GET", b"/%2e%2e/%2e%2e/etc/passwd", (), [b""], 404),
    "an encoded slash": ("POST", b"/v1/translate%2Fen-fr", (), [TEXT], 200),
    "an encoded NUL": ("POST", b"/v1/translate/%00", (), [TEXT], 404),
    "bytes that are not UTF-8": ("POST", b"/v1/translate/%ff%fe", (), [TEXT], 404),
    "markup": ("GET", b"/<script>" + MARK.encode() + b"</script>", (), [b""], 404),
    "line breaks": ("GET", b"/%0d%0aset-cookie:%20a=b", (), [b""], 404),
    "an empty path": ("GET", b"", (), [b""], 200),
    "many slashes": ("POST", b"//v1//translate", (), [TEXT], 404),
    "an unknown query": ("POST", b"/v1/translate/en-fr?a=%ff&&&", (), [TEXT], 200),
    "a long path": ("GET", b"/" + b"a" * 4000, (), [b""], 414),
    "a long query": ("GET", b"/healthz?" + b"a" * 4000, (), [b""], 414),
    # Headers.
    "a large header": ("GET", b"/healthz", [(b"x", b"a" * 4000)], [b""], 431),
    "many headers": ("GET", b"/healthz", [(b"x-%d" % n, b"1") for n in range(400)], [b""], 431),
    "a large cookie at a model": ("POST", b"/v1/translate/en-fr", [(b"cookie", b"a" * 4000)], [TEXT], 431),
    "bytes in a header": ("GET", b"/healthz", [(b"\xff", b"\xfe\x00")], [b""], 200),
    "a request id that cannot be logged": ("GET", b"/healthz", [(b"x-request-id", b'"\n\xff')], [b""], 200),
    "a very long request id": ("GET", b"/healthz", [(b"x-request-id", b"a" * 129)], [b""], 200),
}  # fmt: skip


def model_apps() -> dict[bytes, ASGIApp]:
    limits: dict[str, Any] = {
        "max_body_bytes": 2000, "max_header_bytes": 2048, "max_items": 5, "max_item_characters": 100,
        "max_depth": 8,
    }  # fmt: skip
    columns = {OWN.name: ["a"], DIGITS.name: ["image"]}
    services = {card.name: service(card, None, columns.get(card.name, ["text"]), **limits) for card in CARDS}
    shown = FakeFleet(services)
    edge = Edge(
        CARDS, shown, max_body_bytes=2000, body_timeout_s=1, gate=Gate(max_header_bytes=2048)
    ).application()
    return {b"/v1/translate/en-fr": services[EN_FR.name].application(), b"": edge}


APPS = model_apps()


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_hostile_request_has_its_right_answer(row: Row) -> None:
    method, path, headers, chunks, status = row
    given = headers if any(name == b"content-type" for name, _ in headers) else [*headers, JSON]
    app = APPS[b"/v1/translate/en-fr"] if path.startswith(b"/v1/translate/en-fr") else APPS[b""]
    answer = raw_call(app, method, path, given, chunks)
    assert answer.status == status, answer.body
    assert len(answer.headers["x-request-id"]) in (32, len(dict(headers).get(b"x-request-id", b"a" * 32)))
    if status != 200:
        assert set(json.loads(answer.body)["error"]) == {"code", "message", "hint"}
        assert len(answer.body) < 1000 and MARK.encode() not in answer.body.replace(path, b"")


def test_the_table_is_not_shorter_than_it_was() -> None:
    assert len(ROWS) >= 60


def test_a_request_keeps_its_id_also_in_an_error_and_a_bad_one_is_replaced() -> None:
    app = APPS[b""]
    for path in ("/healthz", "/nothing", "/v1/models"):
        assert call(app, "GET", path, headers={"x-request-id": "a.b/c=1"}).headers["x-request-id"] == "a.b/c=1"
    made = {
        call(app, "GET", "/nothing", headers={"x-request-id": "a b"}).headers["x-request-id"] for _ in range(2)
    }
    assert len(made) == 2 and "a b" not in made


@pytest.mark.parametrize("kind", ["websocket", "lifespan"])
def test_what_is_not_http_is_closed_and_not_answered_by_a_model(kind: str) -> None:
    import asyncio

    sent: list[str] = []

    async def receive() -> Any:
        return {"type": f"{kind}.connect" if kind == "websocket" else "lifespan.shutdown"}

    async def send(message: Any) -> None:
        sent.append(message["type"])

    asyncio.run(APPS[b""]({"type": kind, "path": "/v1/translate", "headers": []}, receive, send))
    assert sent in (["websocket.close"], ["lifespan.startup.complete", "lifespan.shutdown.complete"])


def test_an_error_of_ours_shows_no_input_and_no_traceback() -> None:
    def explode(value: Any) -> Any:
        raise RuntimeError(f"cannot read {value}")

    from serving_fakes import FakeAnswerer

    response = call(service(EN_FR, FakeAnswerer(answer=explode)).application(), "POST", "/v1/translate", TEXT)
    assert (response.status_code, is_error(response)) == (500, True)
    assert MARK not in response.text and "Traceback" not in response.text and "RuntimeError" not in response.text
