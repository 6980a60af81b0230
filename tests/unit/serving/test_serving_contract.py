"""The wire contract: a table of hostile bodies, each with its answer; never a 500, a redirect or an echo."""

from __future__ import annotations

import base64
import io
import json
import pickle
import zlib
from typing import Any

import pytest
from serving_fakes import (
    DIGITS,
    EN_FR,
    LANGID,
    OWN,
    FakeAnswerer,
    OverloadedAnswerer,
    call,
    is_error,
    service,
)

from eagleray_serving.schema import WireError

MALFORMED = {
    "empty": b"",
    "truncated": b'{"text": "a',
    "two values": b'{"text": "a"} {"text": "b"}',
    "single quotes": b"{'text': 'a'}",
    "trailing comma": b'{"text": "a",}',
    "NaN": b'{"text": NaN}',
    "Infinity": b'{"text": "a", "num_beams": Infinity}',
    "-Infinity": b'{"num_beams": -Infinity, "text": "a"}',
    "lone surrogate": b'{"text": "\\ud800"}',
    "lone surrogate in a key": b'{"\\udfff": 1, "text": "a"}',
    "surrogate in UTF-8": b'{"text": "\xed\xa0\x80"}',
    "invalid UTF-8": b'{"text": "\xff\xfe"}',
    "UTF-16": '{"text": "a"}'.encode("utf-16"),
    "deep nesting": b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep objects": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "raw control character": b'{"text": "a\x00b"}',
    "huge integer": b'{"num_beams": ' + b"9" * 10_000 + b"}",
}
NO_REQUEST: dict[str, Any] = {
    "null": None,
    "list": ["a"],
    "string": "a",
    "number": 3,
    "no text": {},
    "null text": {"text": None},
    "number as text": {"text": 3},
    "object as text": {"text": {"a": 1}},
    "empty text": {"text": ""},
    "empty list": {"text": []},
    "empty text in a list": {"text": ["a", ""]},
    "number in a list": {"text": ["a", 3]},
    "list in a list": {"text": [["a"]]},
    "unknown key": {"text": "a", "txet": "b"},
    "misspelt option": {"text": "a", "num_beam": 2},
    "string for a number": {"text": "a", "num_beams": "2"},
    "float for a number": {"text": "a", "num_beams": 2.0},
    "boolean for a number": {"text": "a", "num_beams": True},
    "zero beams": {"text": "a", "num_beams": 0},
    "many beams": {"text": "a", "num_beams": 17},
    "negative length": {"text": "a", "max_new_tokens": -1},
    "number as model": {"text": "a", "model": 3},
    "long model name": {"text": "a", "model": "m" * 129},
    "number as language": {"text": "a", "source": 1},
    "large wrong value": {"text": {"x": "y" * 100_000}},
    "large unknown key": {"text": "a", "k" * 100_000: 1},
    "many wrong items": {"text": [1] * 1000},
}


@pytest.mark.parametrize("body", MALFORMED.values(), ids=MALFORMED)
def test_a_body_that_is_not_json_is_400(body: bytes) -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", body)
    assert (response.status_code, is_error(response)) == (400, True)
    assert response.json()["error"]["code"] == "malformed_json"


@pytest.mark.parametrize("value", NO_REQUEST.values(), ids=NO_REQUEST)
def test_json_that_is_no_request_is_422_and_is_not_echoed(value: Any) -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", json.dumps(value).encode())
    assert (response.status_code, is_error(response)) == (422, True)
    assert response.json()["error"]["code"] == "invalid_request"


def test_an_overflowing_number_is_refused_also_where_any_value_is_allowed() -> None:
    app = service(OWN, columns=["a"]).application()
    assert call(app, "POST", "/v1/predict/own", b'{"inputs": [{"a": [1e400]}]}').status_code == 422
    assert call(app, "POST", "/v1/predict/own", b'{"inputs": [{"a": [1e300]}]}').status_code == 200


def test_an_unknown_key_is_named() -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", b'{"text": "a", "txet": 1}')
    assert response.json()["error"]["message"] == "txet: unknown key"
    assert "num_beams" in response.json()["error"]["hint"]


def test_a_key_that_looks_like_a_branch_of_the_schema_is_still_named() -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", b'{"text": "a", "one": 1}')
    assert response.json()["error"]["message"] == "one: unknown key"


@pytest.mark.parametrize("text", ["a\x00b", "\U0001f600", "\u202e", "a" * 20_000, " "])
def test_an_unusual_text_is_answered(text: str) -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", json.dumps({"text": text}).encode())
    assert response.json()["translations"] == [{"text": text.upper()}]


def test_a_text_a_list_and_a_body_over_their_limits_are_413() -> None:
    app = service(EN_FR, max_item_characters=10, max_items=3, max_body_bytes=1000).application()
    codes = [
        call(app, "POST", "/v1/translate", json.dumps({"text": text}).encode()).json()["error"]["code"]
        for text in ("a" * 11, ["a"] * 4, "a" * 2000, "a" * 10_000)
    ]
    assert codes == ["text_too_long", "too_many_items", "body_too_large", "body_too_large"]


@pytest.mark.parametrize(
    "method, path, status, allow",
    [
        ("GET", "/v1/translate", 405, "POST"),
        ("PUT", "/v1/translate", 405, "POST"),
        ("DELETE", "/v1/translate/en-fr", 405, "POST"),
        ("OPTIONS", "/v1/translate", 405, "POST"),
        ("POST", "/v1/translate/en-fr/more", 404, None),
        ("POST", "/v1/translated", 404, None),
        ("POST", "/v1/translate/other", 404, None),
        ("POST", "/v1/translate/" + "x" * 10_000, 404, None),
        ("POST", "/v1/translate//en-fr", 404, None),
        ("POST", "/v1/translate/%00", 404, None),
    ],
)
def test_a_wrong_method_or_path_is_405_or_404(method: str, path: str, status: int, allow: str | None) -> None:
    response = call(service(EN_FR).application(), method, path, b'{"text": "a"}')
    assert (response.status_code, response.headers.get("allow")) == (status, allow)
    assert is_error(response)


@pytest.mark.parametrize(
    "path", ["/v1/translate", "/v1/translate/", "/v1/translate/en-fr", "/v1/translate/en-fr/"]
)
def test_no_path_is_redirected(path: str) -> None:
    assert call(service(EN_FR).application(), "POST", path, b'{"text": "a"}').status_code == 200


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"content-type": "application/json; charset=utf-8"}, 200),
        ({"content-type": "application/vnd.api+json"}, 200),
        ({"content-type": "text/plain"}, 415),
        ({"content-type": "application/x-www-form-urlencoded"}, 415),
        ({"content-type": "application/json; charset=latin-1"}, 415),
        ({"content-encoding": "gzip"}, 415),
    ],
)
def test_the_content_type_must_be_json(headers: dict[str, str], status: int) -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", b'{"text": "a"}', headers)
    assert response.status_code == status


def test_an_answer_names_model_and_version_and_keeps_the_order() -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", b'{"text": ["a", "b"]}')
    assert response.json() == {
        "model": "en-fr",
        "version": "r1-step-00001200",
        "translations": [{"text": "A"}, {"text": "B"}],
    }


def test_options_reach_the_model_and_others_are_left_to_it() -> None:
    answerer = FakeAnswerer()
    app = service(EN_FR, answerer).application()
    call(app, "POST", "/v1/translate", b'{"text": "a", "num_beams": 4}')
    assert answerer.calls == [([{"text": "a"}], {"num_beams": 4})]


def test_a_bad_item_of_a_list_fails_alone_and_a_bad_text_fails_the_request() -> None:
    app = service(EN_FR).application()
    error = {"error": {"code": "bad_item", "message": "it cannot be used", "hint": "send another"}}
    many = call(app, "POST", "/v1/translate", b'{"text": ["a", "bad", "b"]}')
    assert many.json()["translations"] == [{"text": "A"}, error, {"text": "B"}]
    one = call(app, "POST", "/v1/translate", b'{"text": "bad"}')
    assert (one.status_code, one.json()) == (422, error)


def test_another_pair_of_languages_is_400_and_the_models_own_is_fine() -> None:
    app = service(EN_FR).application()
    assert call(app, "POST", "/v1/translate", b'{"text": "a", "target": "de"}').status_code == 400
    assert call(app, "POST", "/v1/translate", b'{"text": "a", "source": "en", "target": "fr"}').status_code == 200


def test_another_model_in_the_body_is_404() -> None:
    response = call(service(EN_FR).application(), "POST", "/v1/translate", b'{"text": "a", "model": "x"}')
    assert (response.status_code, "en-fr" in response.json()["error"]["hint"]) == (404, True)


def test_an_overloaded_model_is_429_with_retry_after() -> None:
    response = call(service(EN_FR, OverloadedAnswerer()).application(), "POST", "/v1/translate", b'{"text": "a"}')
    assert (response.status_code, response.headers["retry-after"]) == (429, "2")


def test_a_model_that_takes_too_long_is_503_with_retry_after() -> None:
    app = service(EN_FR, FakeAnswerer(delay_s=5), request_timeout_s=0.05).application()
    response = call(app, "POST", "/v1/translate", b'{"text": "a"}')
    assert (response.status_code, response.json()["error"]["code"]) == (503, "timeout")
    assert response.headers["retry-after"] == "1"


def test_our_own_fault_is_500_in_the_error_shape_without_its_text() -> None:
    def explode(value: Any) -> Any:
        raise RuntimeError("secret detail")

    response = call(
        service(EN_FR, FakeAnswerer(answer=explode)).application(), "POST", "/v1/translate", b'{"text": "a"}'
    )
    assert (response.status_code, is_error(response), b"secret" in response.content) == (500, True, False)


@pytest.mark.parametrize(
    "answer", [{"x": float("nan")}, {"x": float("inf")}, {"x": "\ud800"}, {"x": b"a"}, object()]
)
def test_an_answer_that_json_cannot_carry_fails_alone(answer: Any) -> None:
    app = service(OWN, FakeAnswerer(answer=lambda value: answer if value == "odd" else {"y": value}), ["a"])
    response = call(app.application(), "POST", "/v1/predict", b'{"inputs": ["odd", "b"]}')
    assert response.status_code == 200
    first, second = response.json()["predictions"]
    assert (first["error"]["code"], second) == ("bad_answer", {"y": "b"})


def test_inputs_of_a_users_task_are_rows_or_bare_values() -> None:
    answerer = FakeAnswerer()
    call(service(OWN, answerer, ["a"]).application(), "POST", "/v1/predict", b'{"inputs": [{"a": 1, "b": 2}, 3]}')
    assert answerer.calls[0][0] == [{"a": 1, "b": 2}, {"a": 3}]
    two = service(OWN, columns=["a", "b"]).application()
    response = call(two, "POST", "/v1/predict", b'{"inputs": [{"a": 1}]}')
    assert (response.status_code, response.json()["error"]["message"]) == (422, "inputs[0] lacks b")


def test_a_text_for_a_model_of_images_is_422() -> None:
    assert call(service(DIGITS).application(), "POST", "/v1/classify", b'{"text": "a"}').status_code == 422
    assert call(service(LANGID).application(), "POST", "/v1/classify", b'{"images": ["aaaa"]}').status_code == 422
    both = b'{"images": ["aaaa"], "text": "a"}'
    assert call(service(DIGITS).application(), "POST", "/v1/classify", both).status_code == 422


def _png(width: int = 2, height: int = 2) -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("L", (width, height)).save(stream, "PNG")
    return stream.getvalue()


def _bomb(width: int, height: int) -> bytes:
    """A PNG whose header announces more pixels than any memory holds."""
    header = b"IHDR" + width.to_bytes(4) + height.to_bytes(4) + b"\x08\x00\x00\x00\x00"
    chunk = (13).to_bytes(4) + header + zlib.crc32(header).to_bytes(4)
    return b"\x89PNG\r\n\x1a\n" + chunk + (64).to_bytes(4) + b"IDAT" + b"\x00" * 68


IMAGES = {
    "whole": (_png(), 200),
    "empty": (b"", 422),
    "text": (b"hello", 422),
    "GIF": (b"GIF89a\x01\x00\x01\x00\x00\x00\x00;", 422),
    "cut header": (_png()[:20], 422),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", 422),
    "bomb": (_bomb(60_000, 60_000), 413),
    "larger than the limit": (_bomb(8192, 4097), 413),
}


@pytest.mark.parametrize("data, status", IMAGES.values(), ids=IMAGES)
def test_a_broken_image_is_422_and_a_bomb_413(data: bytes, status: int) -> None:
    body = json.dumps({"images": [base64.b64encode(data).decode() or "===="]}).encode()
    assert (
        call(service(DIGITS, columns=["image"]).application(), "POST", "/v1/classify", body).status_code == status
    )


@pytest.mark.parametrize("text", ["not base64!", "data:image/png;base64,aaaa", "YQ", "\u00e9"])
def test_an_image_that_is_not_base64_is_422(text: str) -> None:
    body = json.dumps({"images": [text]}).encode()
    response = call(service(DIGITS, columns=["image"]).application(), "POST", "/v1/classify", body)
    assert (response.status_code, "base64" in response.json()["error"]["message"]) == (422, True)


def test_an_error_survives_the_way_between_processes() -> None:
    error = pickle.loads(pickle.dumps(WireError(429, "overloaded", "m", "h", retry_after_s=3)))
    assert (error.status, error.headers(), error.body()["error"]["hint"]) == (429, {"retry-after": "3"}, "h")
