"""A translation that is sent while it grows."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest
from serving_fakes import EN_FR, FakeAnswerer, GrowingAnswerer, call, is_error, service

from eagleray_serving.answering import ItemFailure
from eagleray_serving.events import MEDIA_TYPE
from eagleray_serving.schema import WireError

ACCEPT = {"accept": MEDIA_TYPE}
BODY = json.dumps({"text": "a b c"}).encode()


def ask(answerer: FakeAnswerer, body: bytes = BODY, **limits: Any) -> httpx.Response:
    return call(service(EN_FR, answerer, **limits).application(), "POST", "/v1/translate", body, ACCEPT)


def events(response: httpx.Response) -> list[tuple[str | None, Any]]:
    """Read events as a browser does."""
    found = []
    for block in response.text.split("\n\n")[:-1]:
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((fields.get("event"), json.loads(fields["data"])))
    return found


def test_a_text_grows_in_events_and_ends_with_the_whole_answer() -> None:
    response = ask(GrowingAnswerer())
    assert (response.status_code, response.headers["content-type"]) == (200, f"{MEDIA_TYPE}; charset=utf-8")
    whole = {"model": "en-fr", "version": EN_FR.version, "translations": [{"text": "A B C"}]}
    assert events(response) == [(None, {"text": "A"}), (None, {"text": "A B"}), ("done", whole)]


def test_what_fails_before_the_first_event_is_an_answer_with_a_status() -> None:
    overloaded = ask(GrowingAnswerer(WireError(429, "overloaded", "too much", retry_after_s=2), at=0))
    assert (overloaded.status_code, overloaded.headers["retry-after"]) == (429, "2") and is_error(overloaded)
    too_long = ask(GrowingAnswerer(ItemFailure("too_long", "it is too long"), at=0))
    assert too_long.status_code == 413 and is_error(too_long)
    slow = ask(GrowingAnswerer(pause_s=9), request_timeout_s=0.05)
    assert (slow.status_code, slow.json()["error"]["code"]) == (503, "timeout")


@pytest.mark.parametrize(
    "ends, code",
    [
        (ItemFailure("model_failed", "it failed"), "model_failed"),
        (WireError(503, "unavailable", "stopping"), "unavailable"),
        (ValueError("a secret"), "internal"),
    ],
)
def test_what_fails_later_is_the_last_event(ends: Exception | ItemFailure, code: str) -> None:
    *first, last = events(ask(GrowingAnswerer(ends, at=1)))
    assert first == [(None, {"text": "A"})]
    assert last[0] == "error" and last[1]["error"]["code"] == code
    assert "secret" not in str(last)


def test_the_time_limit_holds_for_the_whole_stream() -> None:
    answerer = GrowingAnswerer(pause_s=0.04)
    found = events(ask(answerer, request_timeout_s=0.1))
    assert [name for name, _ in found][-1] == "error" and found[-1][1]["error"]["code"] == "timeout"
    assert answerer.was_closed


def test_a_list_is_no_stream_and_other_clients_get_json() -> None:
    refused = ask(GrowingAnswerer(), b'{"text": ["a", "b"]}')
    assert refused.status_code == 422 and is_error(refused)
    assert ask(GrowingAnswerer(), b"{").status_code == 400
    app = service(EN_FR, GrowingAnswerer()).application()
    assert call(app, "POST", "/v1/translate", BODY).json()["translations"] == [{"text": "A B C"}]
