"""One large request over many replicas that die, dawdle, refuse and change their version."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest
from virtual_time import run_virtual

from eagleray_serving.answering import Answers, ItemFailure
from eagleray_serving.bulk import Bulk, Item, Part, ReplicaDiedError, Window
from eagleray_serving.chunks import BulkLimits, Chunk, Pace, estimate_tokens, split_off
from eagleray_serving.schema import WireError

LIMITS = BulkLimits(chunk_tokens=40, chunk_items=8, call_timeout_s=30, patience_s=100)
ITEMS: list[Item] = [{"text": f"sentence {number}"} for number in range(200)]


def answer(item: Item) -> dict[str, Any]:
    return {"text": str(item["text"]).upper()}


EXPECTED = [answer(item) for item in ITEMS]


class FakeReplicas:
    """Some replicas; how each call goes is decided by `behave(number of the call, items)`."""

    def __init__(
        self, behave: Callable[[int, Sequence[Item]], Awaitable[str | None]] | None = None, count: int = 2
    ) -> None:
        self._behave = behave
        self.count = count
        self.calls: list[list[Item]] = []
        self.waiting_tokens: list[int] = []
        self.num_running = self.most_running = self.num_cancelled = 0

    async def count_replicas(self) -> int:
        return self.count

    async def ask(self, items: Sequence[Item], waiting_tokens: int) -> Answers:
        self.calls.append(list(items))
        self.waiting_tokens.append(waiting_tokens)
        number = len(self.calls)
        self.num_running += 1
        self.most_running = max(self.most_running, self.num_running)
        try:
            await asyncio.sleep(1)
            version = await self._behave(number, items) if self._behave is not None else None
            return Answers(version or "r1", [answer(item) for item in items])
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_running -= 1

    def window(self, **options: Any) -> Window:
        return Window(self.count_replicas, **options)


async def collect(replicas: FakeReplicas, window: Window | None = None) -> list[Part]:
    bulk = Bulk(ITEMS, replicas.ask, window or replicas.window(), LIMITS)
    return [part async for part in bulk.parts()]


def items_of(parts: Sequence[Part]) -> list[Any]:
    return [item for part in parts for item in part.items]


def test_chunks_hold_every_item_once_in_order_within_their_budget() -> None:
    sizes = [1, 3, 50, 2, 2, 2] + [1] * 20
    tokens_before = [0, *accumulate(sizes)]
    chunks, left = [], Chunk(0, len(sizes))
    while left is not None:
        chunk, left = split_off(left, tokens_before, 5, 4)
        chunks.append(chunk)
    assert [index for chunk in chunks for index in range(chunk.start, chunk.stop)] == list(range(len(sizes)))
    for chunk in chunks:
        held = sizes[chunk.start : chunk.stop]
        assert len(held) <= 4 and (sum(held) <= 5 or len(held) == 1)
    assert [chunk.stop for chunk in chunks[:4]] == [2, 3, 5, 9], "as much as fits"


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_chunks_are_as_large_as_a_replica_answers_in_a_quarter_of_a_second_and_smaller_at_the_end() -> None:
    clock = Clock()
    pace = Pace(clock)
    assert pace.chunk_tokens(10**6, 2) == 512
    assert pace.chunk_tokens(600, 2) == 150
    clock.now_s += 1000  # nobody asked
    pace.begin()
    for tokens_per_s in (8000, 2000):
        for _ in range(40):
            clock.now_s += 0.5
            pace.add(0.5 * tokens_per_s)
        assert pace.chunk_tokens(10**6, 2) == pytest.approx(tokens_per_s / 4, rel=0.01)
        assert pace.chunk_tokens(1000, 2) == 250
    assert pace.chunk_tokens(30, 2) == 128, "what is smaller costs more than it gives"


def test_a_slow_model_gets_chunks_that_it_answers_in_time() -> None:
    class Slow(FakeReplicas):
        async def ask(self, items: Sequence[Item], waiting_tokens: int) -> Answers:
            clock.now_s += 0.5 * len(items)
            return await super().ask(items, waiting_tokens)

    clock, replicas = Clock(), Slow()

    async def go() -> list[Part]:
        window = replicas.window()
        window.pace = Pace(clock)
        bulk = Bulk([*ITEMS] * 10, replicas.ask, window, BulkLimits())
        return [part async for part in bulk.parts()]

    assert items_of(run_virtual(go())) == EXPECTED * 10
    num_tokens = [sum(map(estimate_tokens, items)) for items in replicas.calls]
    assert num_tokens[0] > 500 and max(num_tokens[4:]) <= 128


@pytest.mark.parametrize(
    "value, low, high",
    [("a", 1, 1), ("hello world, how are you?", 5, 9), ("日本語の文章です", 6, 9), (b"x" * 4096, 4, 6), (3, 1, 1)],
)
def test_tokens_are_estimated_from_bytes(value: Any, low: int, high: int) -> None:
    assert low <= estimate_tokens({"text": value}) <= high


def test_answers_come_in_order_whatever_order_the_replicas_answer_in() -> None:
    shuffled = random.Random(1)

    async def dawdle(number: int, items: Sequence[Item]) -> None:
        await asyncio.sleep(shuffled.random() * 20)

    parts = run_virtual(collect(FakeReplicas(dawdle, count=3)))
    assert items_of(parts) == EXPECTED
    assert [part.start for part in parts] == sorted(part.start for part in parts)


def test_the_window_follows_the_number_of_replicas() -> None:
    replicas = FakeReplicas(count=1)

    async def grow(number: int, items: Sequence[Item]) -> None:
        if number == 4:
            assert replicas.most_running == 2
            replicas.count = 5

    replicas._behave = grow
    run_virtual(collect(replicas))
    assert replicas.most_running == 10


def test_two_requests_share_the_window_and_neither_waits_for_the_other_to_end() -> None:
    replicas = FakeReplicas(count=1)

    async def both() -> list[float]:
        window = replicas.window()

        async def one() -> float:
            assert items_of(await collect(replicas, window)) == EXPECTED
            return asyncio.get_running_loop().time()

        return await asyncio.gather(one(), one())

    first, second = run_virtual(both())
    assert replicas.most_running == 2
    assert abs(first - second) <= 2


def test_a_request_beyond_the_limit_is_refused_at_once_and_says_when_to_come_again() -> None:
    replicas = FakeReplicas()

    async def go() -> WireError:
        window = replicas.window(max_requests=1)
        running = asyncio.create_task(collect(replicas, window))
        await asyncio.sleep(5)
        with pytest.raises(WireError) as refused:
            await collect(replicas, window)
        assert items_of(await running) == EXPECTED
        assert items_of(await collect(replicas, window)) == EXPECTED, "its place is free again"
        assert window.num_waiting_tokens == 0
        return refused.value

    error = run_virtual(go())
    assert (error.status, error.code) == (429, "overloaded")
    assert error.retry_after_s is not None and 1 <= error.retry_after_s <= 60


def test_chunks_of_replicas_that_die_run_elsewhere_and_the_answer_is_the_same() -> None:
    async def die_often(number: int, items: Sequence[Item]) -> None:
        if number % 5 == 0:
            raise ReplicaDiedError("killed")

    assert items_of(run_virtual(collect(FakeReplicas(die_often)))) == EXPECTED


def test_an_item_that_kills_its_replicas_fails_alone_and_is_found_by_few_deaths() -> None:
    num_deaths = 0

    async def poisoned(number: int, items: Sequence[Item]) -> None:
        nonlocal num_deaths
        if ITEMS[77] in items:
            num_deaths += 1
            raise ReplicaDiedError("killed")

    replicas = FakeReplicas(poisoned)
    found = items_of(run_virtual(collect(replicas)))
    failed = found.pop(77)
    assert isinstance(failed, ItemFailure) and failed.code == "model_failed"
    assert found == EXPECTED[:77] + EXPECTED[78:]
    assert num_deaths <= 2 + 3 + 1, "a whole chunk of 8 twice, its halves, the item"
    alone = [call for call in replicas.calls if len(call) < 8]
    assert alone, "the halves ran"


def test_a_suspect_runs_alone_so_that_no_other_chunk_dies_with_it() -> None:
    async def poisoned(number: int, items: Sequence[Item]) -> None:
        if ITEMS[77] in items and len(items) < 8:
            assert replicas.num_running == 1
        if ITEMS[77] in items:
            raise ReplicaDiedError("killed")

    replicas = FakeReplicas(poisoned, count=4)
    assert len(items_of(run_virtual(collect(replicas)))) == len(ITEMS)


def test_a_chunk_that_gets_no_answer_in_time_counts_as_dead() -> None:
    async def hang(number: int, items: Sequence[Item]) -> None:
        if number == 3:
            await asyncio.sleep(10_000)

    replicas = FakeReplicas(hang)
    assert items_of(run_virtual(collect(replicas))) == EXPECTED
    assert replicas.num_cancelled == 1


def test_a_chunk_that_is_refused_for_now_comes_again_later() -> None:
    async def busy(number: int, items: Sequence[Item]) -> None:
        if number % 3 == 0:
            raise WireError(429, "overloaded", "too much", retry_after_s=2)

    assert items_of(run_virtual(collect(FakeReplicas(busy)))) == EXPECTED


def test_refusals_for_ever_end_the_request_with_the_refusal() -> None:
    async def gone(number: int, items: Sequence[Item]) -> None:
        raise WireError(503, "unavailable", "no replica")

    with pytest.raises(WireError) as refused:
        run_virtual(collect(FakeReplicas(gone)))
    assert refused.value.status == 503


def test_a_fault_of_the_request_is_not_tried_again() -> None:
    async def refuse(number: int, items: Sequence[Item]) -> None:
        raise WireError(422, "invalid_request", "no")

    replicas = FakeReplicas(refuse)
    with pytest.raises(WireError) as refused:
        run_virtual(collect(replicas))
    assert (refused.value.status, len(replicas.calls) <= 4) == (422, True)


def test_a_client_that_goes_takes_everything_in_flight_with_it() -> None:
    replicas = FakeReplicas(count=3)

    async def go() -> int:
        window = replicas.window()
        task = asyncio.create_task(collect(replicas, window))
        await asyncio.sleep(2.5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        num_calls = len(replicas.calls)
        await asyncio.sleep(100)
        assert len(replicas.calls) == num_calls
        return window.num_in_flight + window.num_waiting_tokens + window.num_requests

    assert run_virtual(go()) == 0
    assert (replicas.num_running, replicas.num_cancelled) == (0, 6)


def test_a_reader_that_stops_after_some_lines_cancels_the_rest() -> None:
    replicas = FakeReplicas()

    async def go() -> None:
        parts = Bulk(ITEMS, replicas.ask, replicas.window(), LIMITS).parts()
        async for _ in parts:
            break
        await parts.aclose()

    run_virtual(go())
    assert replicas.num_running == 0


def test_a_slow_reader_slows_the_request_down() -> None:
    replicas = FakeReplicas()

    async def go() -> int:
        parts = Bulk(ITEMS, replicas.ask, replicas.window(), LIMITS).parts()
        await anext(parts)
        await asyncio.sleep(1000)
        num_calls = len(replicas.calls)
        await parts.aclose()
        return num_calls

    assert run_virtual(go()) <= 8


def test_what_waits_behind_a_slow_chunk_is_bounded() -> None:
    async def stuck(number: int, items: Sequence[Item]) -> None:
        if number == 1:
            await asyncio.sleep(25)

    replicas = FakeReplicas(stuck, count=1)

    async def go() -> int:
        parts = Bulk(ITEMS, replicas.ask, replicas.window(), LIMITS).parts()
        first = await anext(parts)
        assert first.start == 0
        num_calls = len(replicas.calls)
        await parts.aclose()
        return num_calls

    assert run_virtual(go()) <= 2 + 4 * 2


def test_a_whole_answer_is_of_one_version_and_asks_for_the_others_again() -> None:
    async def swap(number: int, items: Sequence[Item]) -> str:
        return "r1" if number <= 10 else "r2"

    replicas = FakeReplicas(swap)
    answers = run_virtual(Bulk(ITEMS, replicas.ask, replicas.window(), LIMITS).whole())
    assert (answers.version, list(answers.items)) == ("r2", EXPECTED)
    assert len(replicas.calls) == len(ITEMS) / LIMITS.chunk_items + 10


def test_versions_that_never_settle_are_said() -> None:
    async def flap(number: int, items: Sequence[Item]) -> str:
        return f"r{number % 2}"

    with pytest.raises(WireError) as failed:
        replicas = FakeReplicas(flap)
        run_virtual(Bulk(ITEMS, replicas.ask, replicas.window(), LIMITS).whole())
    assert failed.value.code == "version_changed"


def test_parts_name_the_version_of_each() -> None:
    async def swap(number: int, items: Sequence[Item]) -> str:
        return "r1" if number <= 10 else "r2"

    versions = [part.version for part in run_virtual(collect(FakeReplicas(swap)))]
    assert versions == sorted(versions, key=str) and set(versions) == {"r1", "r2"}


def test_replicas_hear_what_the_request_still_holds_back() -> None:
    replicas = FakeReplicas()
    run_virtual(collect(replicas))
    assert replicas.waiting_tokens[0] > replicas.waiting_tokens[-1] == 0
    assert replicas.waiting_tokens == sorted(replicas.waiting_tokens, reverse=True)


def test_a_single_item_needs_three_deaths_to_be_at_fault() -> None:
    (once,) = Chunk(5, 6).after_death()
    (twice,) = once.after_death()
    assert (once.is_suspect, twice.is_suspect, twice.after_death()) == (False, True, ())
