"""Admission in front of the batcher: what is refused, when to come again, and what is encoded where."""

from __future__ import annotations

import asyncio
import re
import threading
import time
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from eagleray.config.serving import ServeConfig
from eagleray.engine import BatchLimits
from eagleray.engine.items import ItemError, Prepared
from eagleray_serving.answering import Asking, ItemFailure
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.schema import WireError

ASKING = Asking("id")


class FakeEngine:
    """Answers batches of 4 in 2 ms; notes in which threads it encoded; only encoding moves its clock."""

    limits = BatchLimits(4, 64)
    summary = SimpleNamespace(version="r1", route="predict", ref="m@r1")

    def __init__(self, prepare_s: float = 0.0) -> None:
        self.prepare_s = prepare_s
        self.encoded_in: list[str] = []
        self.now_s = 0.0
        self.num_batches = 0

    def prepare(self, item: Mapping[str, Any]) -> Prepared:
        time.sleep(self.prepare_s)
        self.now_s += self.prepare_s
        self.encoded_in.append(threading.current_thread().name)
        return Prepared(item, (item,), ({},), (1,))

    def run(self, items: Sequence[Prepared], options: Mapping[str, Any]) -> list[Any]:
        self.num_batches += 1
        time.sleep(0.002)
        return [{"value": item.example["value"]} for item in items]

    def stepper(self, options: Mapping[str, Any]) -> None:
        return None

    def close(self) -> None:
        pass


def batched(engine: FakeEngine, **limits: Any) -> BatchedEngine:
    return BatchedEngine(engine, ServeConfig(**limits), clock=lambda: engine.now_s)  # type: ignore[arg-type]


def test_ten_times_the_capacity_is_refused_at_once_and_the_rest_is_answered_in_bounded_time() -> None:
    """2,000 items a second are answered, 20,000 come; 40 may wait, which is 20 ms of work."""

    async def go() -> tuple[list[int], list[WireError], int]:
        fake = FakeEngine()
        engine = batched(fake, max_queued_tokens=40)
        taken: list[int] = []  # batches that ran meanwhile
        refused: list[WireError] = []
        most = 0

        async def ask(number: int) -> None:
            begin = fake.num_batches
            try:
                answers = await engine.answer([{"value": number}], {}, ASKING)
            except WireError as error:
                assert fake.num_batches == begin, "refused at once"
                refused.append(error)
            else:
                assert answers.items == [{"value": number}]
                taken.append(fake.num_batches - begin)

        async with asyncio.TaskGroup() as group:
            for number in range(4000):
                group.create_task(ask(number))
                most = max(most, engine.num_tokens)
                if number % 20 == 0:
                    await asyncio.sleep(0.001)
        assert engine.num_tokens == 0
        await engine.close()
        return taken, refused, most

    taken, refused, most = asyncio.run(go())
    assert len(taken) + len(refused) == 4000 and len(refused) > 1000 and len(taken) > 100
    assert most <= 40 + 2 * 4 + 1, "what waits and what is in work is bounded"
    assert max(taken) <= 40 / 4 + 2, "those before it, those in work and its own"
    assert {error.status for error in refused} == {429}
    assert all(error.retry_after_s is not None and 1 <= error.retry_after_s <= 60 for error in refused)


def test_items_that_wait_to_be_encoded_count_too() -> None:
    async def go() -> list[bool]:
        engine = batched(FakeEngine(prepare_s=0.01), max_queued_tokens=5)
        asked = (engine.answer([{"value": number}], {}, ASKING) for number in range(20))
        found = await asyncio.gather(*asked, return_exceptions=True)
        await engine.close()
        return [isinstance(each, WireError) for each in found]

    assert asyncio.run(go()) == [False] * 5 + [True] * 15


@pytest.mark.parametrize("prepare_s, where", [(0.0, "MainThread"), (0.002, "eagleray-prepare")])
def test_small_items_are_encoded_where_they_arrive_while_that_is_quick(prepare_s: float, where: str) -> None:
    fake = FakeEngine(prepare_s)

    async def go() -> None:
        engine = batched(fake)
        for number in range(30):
            await engine.answer([{"value": number}], {}, ASKING)
        await engine.close()

    asyncio.run(go())
    assert fake.encoded_in[0].startswith("eagleray-prepare"), "nothing is known of the first one"
    assert fake.encoded_in[-1].startswith(where)


def test_long_items_and_lists_leave_the_loop_free() -> None:
    fake = FakeEngine()

    async def go() -> None:
        engine = batched(fake)
        for number in range(30):
            await engine.answer([{"value": number}], {}, ASKING)
        fake.encoded_in.clear()
        await engine.answer([{"value": "x" * 1000}], {}, ASKING)
        await engine.answer([{"value": 1}, {"value": 2}], {}, ASKING)
        await engine.close()

    asyncio.run(go())
    assert all(name.startswith("eagleray-prepare") for name in fake.encoded_in)


class TellingEngine(FakeEngine):
    """Says what it was asked, in whatever it raises."""

    def prepare(self, item: Mapping[str, Any]) -> Prepared:
        if item["value"] == "my secret":
            raise ValueError(f"could not convert {item['value']}")
        return super().prepare(item)

    def run(self, items: Sequence[Prepared], options: Mapping[str, Any]) -> list[Any]:
        return [ItemError("model_failed", "the model failed (ValueError)", detail="my secret")] * len(items)


def test_what_a_task_says_of_an_item_is_not_told_to_those_who_ask() -> None:
    async def main() -> None:
        engine = batched(TellingEngine())
        answers = await engine.answer([{"value": "my secret"}, {"value": 1.0}], {}, ASKING)
        assert [failed.message for failed in answers.items if isinstance(failed, ItemFailure)] == [
            "the task cannot use this item (ValueError)",
            "the model failed (ValueError)",
        ]
        assert "secret" not in repr(answers)
        await engine.close()

    asyncio.run(main())


class StuckEngine(FakeEngine):
    """Encodes `encode` and runs `run` for as long as nobody lets go of it."""

    def __init__(self) -> None:
        super().__init__()
        self.let_go = threading.Event()

    def prepare(self, item: Mapping[str, Any]) -> Prepared:
        if item["value"] == "encode":
            self.let_go.wait(30)
        return super().prepare(item)

    def run(self, items: Sequence[Prepared], options: Mapping[str, Any]) -> list[Any]:
        if items[0].example["value"] == "run":
            self.let_go.wait(30)
        return super().run(items, options)


@pytest.mark.parametrize(
    "value, trouble",
    [
        ("run", r"the model has been at one batch for \d+ s; the limit is 1 s"),
        ("encode", "an item has been encoded for 7 s; the limit is 1 s"),
    ],
)
def test_what_takes_twice_the_time_of_a_request_is_trouble_until_it_ends(value: str, trouble: str) -> None:
    async def go() -> list[str | None]:
        fake = StuckEngine()
        engine = batched(fake, request_timeout_s=0.5)
        seen = [engine.trouble]
        asking = asyncio.create_task(engine.answer([{"value": value}], {}, ASKING))
        await asyncio.sleep(0.05)
        seen.append(engine.trouble)
        fake.now_s += 7 if value == "encode" else 0
        async with asyncio.timeout(10):
            while engine.trouble is None:
                await asyncio.sleep(0.01)
        seen.append(engine.trouble)
        fake.let_go.set()
        await asking
        seen.append(engine.trouble)
        await engine.close()
        return [*seen, engine.trouble]

    before, meanwhile, stuck, *after = asyncio.run(go())
    assert [before, meanwhile, *after] == [None] * 4
    assert stuck is not None and re.fullmatch(trouble, stuck)


def test_a_thread_that_has_ended_is_trouble() -> None:
    async def go() -> str | None:
        engine = batched(FakeEngine())
        await engine.answer([{"value": 1}], {}, ASKING)
        engine._running.close()  # as whatever ends a thread
        return engine.trouble

    assert asyncio.run(go()) == "the model's thread has ended"
