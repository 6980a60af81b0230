"""The leader's side of a group against ranks that are threads: results, failures, silence."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

import pytest

from eagleray.engine.group.link import CommandFailedError, Link, is_in_step
from eagleray.engine.group.wire import Close, Compare, Done, Ended, Failed, Ping, Pong, Run, receive, send
from eagleray.errors import RanksLostError

Reply = Callable[[Any], list[Any]]


class FakeRank:
    """Answers messages by a function; a string ends it."""

    def __init__(self, reply: Reply) -> None:
        self.ours, self._theirs = Pipe()
        self._reply = reply
        self.seen: list[Any] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                message = receive(self._theirs)
            except (EOFError, OSError, TypeError):  # the last one where this end was closed meanwhile
                return
            self.seen.append(type(message))
            for reply in self._reply(message):
                if reply == "die":
                    self._theirs.close()
                    return
                with suppress(OSError):  # the leader is gone
                    send(self._theirs, reply)


def answering(value: Any) -> Reply:
    def reply(message: Any) -> list[Any]:
        if isinstance(message, Ping):
            return [Pong()]
        return [Done(message.number, value)] if isinstance(message, Run) else []

    return reply


def failing(place: str, *, lost_peer: bool = False) -> Reply:
    def reply(message: Any) -> list[Any]:
        if isinstance(message, Run):
            return [Failed(message.number, "ValueError", "no", "traceback", place, lost_peer)]
        if isinstance(message, Compare):
            return [Ended(message.number, place)]
        return [Pong()] if isinstance(message, Ping) else []

    return reply


def dying(message: Any) -> list[Any]:
    return ["die"] if isinstance(message, Run) else [Pong()]


def silent(message: Any) -> list[Any]:
    return []


@pytest.fixture
def linked() -> Iterator[Callable[..., tuple[Link, list[str]]]]:
    links: list[Link] = []

    def make(*replies: Reply, stages: list[list[int]] | None = None, timeout_s: float = 2.0) -> Any:
        lost: list[str] = []
        connections: list[Connection] = [FakeRank(reply).ours for reply in replies]  # type: ignore[misc]
        links.append(Link(connections, stages or [list(range(len(replies)))], timeout_s, lost.append))
        return links[-1], lost

    yield make
    for link in links:
        link.close()


def test_the_last_stage_says_the_result_in_the_order_of_its_ranks(linked: Any) -> None:
    link, _ = linked(answering("first"), answering("second"))
    assert link.call(None) == ["first", "second"]
    link, _ = linked(silent_but_alive, answering("result"), stages=[[0], [1]])
    assert link.call(None) == ["result"]
    link, _ = linked(answering("whole"), answering(None))
    assert link.call(None) == ["whole"]


def silent_but_alive(message: Any) -> list[Any]:
    return [Pong()] if isinstance(message, Ping) else []


def test_what_every_rank_raises_alike_is_the_models_failure(linked: Any) -> None:
    link, lost = linked(failing("here"), failing("here"))
    with pytest.raises(CommandFailedError, match="ValueError: no"):
        link.call(None)
    assert lost == [] and link.lost is None


@pytest.mark.parametrize("other", [failing("there"), answering(1), failing("here", lost_peer=True), dying])
def test_ranks_that_do_not_fail_alike_are_lost(linked: Any, other: Reply) -> None:
    link, lost = linked(failing("here"), other)
    for _ in range(2):
        with pytest.raises(RanksLostError):
            link.call(None)
    assert len(lost) == 1


def test_a_rank_that_ends_is_noticed_at_once_while_nobody_asks(linked: Any) -> None:
    rank = FakeRank(silent_but_alive)
    link = Link([rank.ours], [[0]], 5.0)  # type: ignore[list-item]
    rank._theirs.close()
    deadline = time.monotonic() + 5
    while link.lost is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert link.lost == "rank 0 is gone"


def test_a_rank_that_does_not_say_that_it_lives_is_lost_after_its_time(linked: Any) -> None:
    begin = time.monotonic()
    link, lost = linked(answering(1), silent, timeout_s=1.0)
    with pytest.raises(RanksLostError, match=r"rank 1 did not answer within 1 s"):
        link.call(None)
    assert 1 <= time.monotonic() - begin < 4
    assert len(lost) == 1


def test_closing_tells_every_rank_and_loses_none(linked: Any) -> None:
    rank = FakeRank(lambda message: ["die"] if isinstance(message, Close) else [])
    lost: list[str] = []
    link = Link([rank.ours], [[0]], 5.0, lost.append)  # type: ignore[list-item]
    link.close()
    assert rank.seen[-1] is Close and lost == []


@pytest.mark.parametrize(
    "places, stages, expected",
    [
        ({0: "a", 1: "a"}, [[0, 1]], True),
        ({0: "a", 1: "b"}, [[0, 1]], False),
        ({0: "a", 1: None}, [[0, 1]], False),
        ({0: None, 1: "a"}, [[0], [1]], True),  # the last stage raised
        ({0: "a", 1: "failed before"}, [[0], [1]], True),  # the first one did, and said so
        ({0: "a", 1: None}, [[0], [1]], False),  # the last stage computed with nothing
        ({0: None, 1: None, 2: "a", 3: "a"}, [[0, 1], [2, 3]], True),
        ({0: None, 1: "a", 2: "a", 3: "a"}, [[0, 1], [2, 3]], False),
    ],
)
def test_when_ranks_are_in_step(places: dict[int, str | None], stages: list[list[int]], expected: bool) -> None:
    assert is_in_step(places, stages) is expected
