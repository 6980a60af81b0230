"""What the real front makes of bytes that are hardly HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from real_front import RealFront, exchange, real_front
from serving_fakes import EN_FR, FakeAnswerer, service

HEAD = b"POST /v1/translate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
BODY = b'{"text": "a"}'
CHUNKED = HEAD + b"transfer-encoding: chunked\r\n\r\n"
GOOD = HEAD + b"content-length: %d\r\n\r\n" % len(BODY) + BODY
GET = b"GET /v1/translate HTTP/1.1\r\nhost: x\r\n"
UPGRADE = b"connection: upgrade\r\nupgrade: websocket\r\nsec-websocket-version: 13\r\n"
WEBSOCKET_KEY = b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
# Pieces that are sent one after another, and the statuses of the answers.
IN_OUR_SHAPE: dict[str, tuple[tuple[bytes, ...], list[int]]] = {
    "whole": ((GOOD,), [200]),
    "head and body apart": ((GOOD[:60], GOOD[60:-4], GOOD[-4:]), [200]),
    "pipelined": ((GOOD + GOOD + GET + b"\r\n",), [200, 200, 405]),
    "chunked": ((CHUNKED + b"5\r\n" + BODY[:5] + b"\r\n8\r\n" + BODY[5:] + b"\r\n0\r\n\r\n",), [200]),
    "no content-length": ((HEAD + b"\r\n",), [400]),
    "content-length of nothing": ((HEAD + b"content-length: 0\r\n\r\n",), [400]),
    "more bytes promised than sent": ((HEAD + b"content-length: 99\r\n\r\n" + BODY,), [408]),
    "a client that waits": ((HEAD + b"expect: 100-continue\r\ncontent-length: 13\r\n\r\n", BODY), [100, 200]),
    "an old client": ((b"GET /v1/translate HTTP/1.0\r\n\r\n",), [405]),
    "an unknown method": ((b"BREW /v1/translate HTTP/1.1\r\nhost: x\r\n\r\n",), [405]),
    "CONNECT": ((b"CONNECT a:1 HTTP/1.1\r\nhost: a:1\r\n\r\n",), [405]),
    "an upgrade to HTTP/2": ((GET + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n",), [405]),
    "an upgrade to a web socket": ((GET + UPGRADE + WEBSOCKET_KEY,), [405]),
    "a long URL": ((b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\n\r\n",), [414]),
    "a large header": ((GET + b"x: " + b"a" * 5000 + b"\r\n\r\n",), [431]),
    "many headers": ((GET + b"".join(b"x%d: 1\r\n" % n for n in range(600)) + b"\r\n",), [431]),
    "the routes of Serve": ((b"GET /-/Routes HTTP/1.1\r\nhost: x\r\n\r\n",), [404]),
    "a request id of other bytes": ((GET + b"x-request-id: \xff\xfe\r\n\r\n",), [405]),
}  # fmt: skip
# HAProxy 2.8 finds these before there is a request, and answers in words that no setting of it changes.
IN_ITS_OWN_WORDS: dict[str, tuple[bytes, int]] = {
    "garbage": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 9, 400),
    "garbage behind a request": (GOOD + b"\x00\x01\x02\r\n\r\n", 400),
    "no version": (b"GET /\r\n\r\n", 400),
    "NUL in the path": (b"GET /\x00 HTTP/1.1\r\nhost: x\r\n\r\n", 400),
    "two lengths": (HEAD + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc", 400),
    "an upgrade without a key": (GET + UPGRADE + b"\r\n", 400),
    "a negative length": (HEAD + b"content-length: -3\r\n\r\n", 400),
    "no number as length": (HEAD + b"content-length: x\r\n\r\n", 400),
    "a bad chunk": (CHUNKED + b"zz\r\nabc\r\n", 400),
    "headers larger than any buffer": (GET + b"x: " + b"a" * 300_000 + b"\r\n\r\n", 400),
    "headers that do not end": (GET, 408),
}


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealFront]:
    app = service(EN_FR, FakeAnswerer(), request_timeout_s=3).application()
    with real_front(app, tmp_path_factory.mktemp("front")) as found:
        yield found


def answers_in(data: bytes) -> list[tuple[int, dict[str, str], bytes]]:
    """Cut a stream of answers at their lengths."""
    found = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(headers.get("content-length", 0))
        found.append((int(first.split()[1]), headers, rest[:length]))
        data = rest[length:]
    return found


@pytest.mark.parametrize("pieces, statuses", IN_OUR_SHAPE.values(), ids=IN_OUR_SHAPE)
def test_what_is_http_is_answered_in_our_shape(
    front: RealFront, pieces: tuple[bytes, ...], statuses: list[int]
) -> None:
    answers = answers_in(exchange(front.port, *pieces))
    assert [status for status, _, _ in answers] == statuses
    for status, headers, body in answers:
        if status == 100:
            continue
        assert headers["content-type"] == "application/json" and len(headers["x-request-id"]) >= 32
        assert ("error" in json.loads(body)) == (status != 200)


@pytest.mark.parametrize("data, status", IN_ITS_OWN_WORDS.values(), ids=IN_ITS_OWN_WORDS)
def test_what_is_not_http_is_refused_and_hurts_nobody(front: RealFront, data: bytes, status: int) -> None:
    assert answers_in(exchange(front.port, data))[-1][0] == status
    assert answers_in(exchange(front.port, GOOD))[0][0] == 200


def test_a_request_keeps_its_id_through_the_front(front: RealFront) -> None:
    asked = GET + b"x-request-id: a.b/c+d=1\r\n\r\n"
    ((_, headers, _),) = answers_in(exchange(front.port, asked))
    assert headers["x-request-id"] == "a.b/c+d=1"
    refused = b"GET /" + b"a" * 5000 + b" HTTP/1.1\r\nhost: x\r\nx-request-id: mine\r\n\r\n"
    ((_, headers, _),) = answers_in(exchange(front.port, refused))
    assert headers["x-request-id"] == "mine"
