"""The batcher, on a clock of its own."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import pytest
from virtual_time import run_virtual

from eagleray.engine.batcher import Batcher, Lane
from eagleray.engine.plan import BatchLimits, choose_batch, cut_batches
from eagleray.engine.work import Ended, Entering, in_batches
from eagleray.errors import ModelStoppedError, RequestTimeoutError


class SlowModel:
    """Doubles numbers, a fixed time per batch; `bad` items make their whole batch fail."""

    def __init__(self, batch_s: float = 0.2, bad: Sequence[int] = ()) -> None:
        self.batch_s = batch_s
        self.bad = set(bad)
        self.batches: list[list[int]] = []
        self.options: list[Mapping[str, Any]] = []

    async def __call__(self, items: Sequence[int], options: Mapping[str, Any]) -> list[int]:
        self.batches.append(list(items))
        self.options.append(options)
        await asyncio.sleep(self.batch_s)
        if self.bad & set(items):
            raise ValueError(f"cannot double {sorted(self.bad & set(items))}")
        return [2 * item for item in items]


def batcher(model: Any, max_items: int = 64, max_tokens: int = 8192, **options: Any) -> Batcher[int, int]:
    return Batcher(in_batches(model), BatchLimits(max_items, max_tokens), **options)


def test_items_gather_while_the_model_is_busy() -> None:
    model = SlowModel(batch_s=0.2)

    async def main() -> float:
        b = batcher(model)

        async def arrive(i: int) -> int:
            await asyncio.sleep(0.005 * i)
            return await b.submit(i, num_tokens=10)

        assert await asyncio.gather(*(arrive(i) for i in range(200))) == [2 * i for i in range(200)]
        return asyncio.get_running_loop().time()

    seconds = run_virtual(main())
    assert seconds <= 1.5
    assert 200 / len(model.batches) >= 30


def test_an_item_that_meets_an_idle_model_waits_for_nobody() -> None:
    model = SlowModel(batch_s=0.2)

    async def main() -> None:
        b, loop = batcher(model), asyncio.get_running_loop()
        for i in range(3):
            started_s = loop.time()
            await b.submit(i, num_tokens=1)
            assert loop.time() - started_s == pytest.approx(0.2)
            await asyncio.sleep(1)

    run_virtual(main())
    assert model.batches == [[0], [1], [2]]


def test_a_batch_keeps_to_its_items_and_padded_tokens() -> None:
    model = SlowModel()

    async def main() -> None:
        b = batcher(model, max_items=4, max_tokens=40)
        lengths = [10, 10, 10, 10, 10, 20, 20, 20, 100, 1]
        await asyncio.gather(*(b.submit(length, num_tokens=length) for length in lengths))

    run_virtual(main())
    assert sorted(item for batch in model.batches for item in batch) == sorted([10] * 5 + [20] * 3 + [100, 1])
    for batch in model.batches:
        assert len(batch) <= 4
        assert len(batch) == 1 or len(batch) * max(batch) <= 40


def test_a_bad_item_fails_alone() -> None:
    model = SlowModel(bad=[3, 11])

    async def main() -> list[int | BaseException]:
        b = batcher(model)
        return await asyncio.gather(*(b.submit(i, num_tokens=1) for i in range(16)), return_exceptions=True)

    results = run_virtual(main())
    for i, result in enumerate(results):
        if i in (3, 11):
            assert isinstance(result, ValueError) and str(result) == f"cannot double [{i}]"
        else:
            assert result == 2 * i


def test_interactive_items_go_first_and_bulk_items_are_never_starved() -> None:
    model = SlowModel(batch_s=1)

    async def main() -> list[int]:
        b, order = batcher(model, max_items=1, bulk_share=4), []

        async def ask(i: int, lane: Lane) -> None:
            await b.submit(i, num_tokens=1, lane=lane)
            order.append(i)

        bulk = [asyncio.create_task(ask(100 + i, Lane.BULK)) for i in range(2)]
        await asyncio.sleep(0.5)  # the first bulk item found the model idle
        interactive = [asyncio.create_task(ask(i, Lane.INTERACTIVE)) for i in range(8)]
        await asyncio.gather(*bulk, *interactive)
        return order

    assert run_virtual(main()) == [100, 0, 1, 2, 101, 3, 4, 5, 6, 7]


def test_interactive_items_do_not_wait_for_bulk_items_in_a_batch_of_theirs() -> None:
    model = SlowModel()

    async def main() -> None:
        b = batcher(model, max_items=3)
        first = asyncio.create_task(b.submit(0, num_tokens=1))
        await asyncio.sleep(0.1)
        bulk = [b.submit(100 + i, num_tokens=1, lane=Lane.BULK) for i in range(2)]
        await asyncio.gather(first, *bulk, b.submit(1, num_tokens=1), b.submit(2, num_tokens=1))

    run_virtual(main())
    assert [sorted(batch) for batch in model.batches] == [[0], [1, 2], [100, 101]]


def test_only_items_of_equal_options_share_a_batch() -> None:
    model = SlowModel()

    async def main() -> None:
        b = batcher(model)
        await asyncio.gather(*(b.submit(i, num_tokens=1, options={"num_beams": i % 2}) for i in range(6)))

    run_virtual(main())
    assert [sorted(batch) for batch in model.batches] == [[0, 2, 4], [1, 3, 5]]
    assert model.options == [{"num_beams": 0}, {"num_beams": 1}]


def test_a_cancelled_item_is_not_run() -> None:
    model = SlowModel()

    async def main() -> None:
        b = batcher(model)
        tasks = [asyncio.create_task(b.submit(i, num_tokens=5)) for i in range(3)]
        await asyncio.sleep(0.1)  # all three are running
        late = [asyncio.create_task(b.submit(10 + i, num_tokens=5)) for i in range(3)]
        await asyncio.sleep(0)
        assert (b.num_queued_items, b.num_queued_tokens) == (3, 15)
        late[1].cancel()
        tasks[0].cancel()
        await asyncio.sleep(0)
        assert (b.num_queued_items, b.num_queued_tokens) == (2, 10)
        assert await asyncio.gather(*tasks[1:], late[0], late[2]) == [2, 4, 20, 24]
        assert (b.num_queued_items, b.num_queued_tokens) == (0, 0)

    run_virtual(main())
    assert model.batches == [[0, 1, 2], [10, 12]]


def test_an_item_whose_time_is_over_is_answered_at_that_time_waiting_or_running() -> None:
    model = SlowModel(batch_s=1)

    async def main() -> None:
        b, loop = batcher(model, max_items=1), asyncio.get_running_loop()
        running = asyncio.create_task(b.submit(0, num_tokens=1, timeout_s=0.3))
        waiting = asyncio.create_task(b.submit(1, num_tokens=1, timeout_s=0.5))
        patient = asyncio.create_task(b.submit(2, num_tokens=1, timeout_s=5))
        with pytest.raises(RequestTimeoutError, match=r"no answer within 0\.3 s"):
            await running
        assert loop.time() == pytest.approx(0.3)
        with pytest.raises(RequestTimeoutError):
            await waiting
        assert loop.time() == pytest.approx(0.5)
        assert await patient == 4

    run_virtual(main())
    assert model.batches == [[0], [2]]


class HostileModel:
    """Does what a model must not do, once each, then behaves."""

    def __init__(self) -> None:
        self.calls = 0

    async def __call__(self, items: Sequence[int], options: Mapping[str, Any]) -> list[int]:
        self.calls += 1
        match self.calls:
            case 1:
                raise asyncio.CancelledError
            case 2:
                return []
            case 3:
                raise TimeoutError("the model's own")
        return list(items)


def test_nothing_that_a_model_does_stops_the_loop() -> None:
    async def main() -> list[int | BaseException]:
        b = batcher(HostileModel())
        results: list[int | BaseException] = []
        for i in range(4):
            results += await asyncio.gather(b.submit(i, num_tokens=10**9, timeout_s=9), return_exceptions=True)
        return results

    cancelled, short, timed_out, good = run_virtual(main())
    assert isinstance(cancelled, RuntimeError) and "the model was cancelled" in str(cancelled)
    assert isinstance(short, RuntimeError) and "gave 0 results for 1 items" in str(short)
    assert isinstance(timed_out, TimeoutError) and str(timed_out) == "the model's own"
    assert good == 3


def test_closing_answers_what_runs_and_refuses_what_waits() -> None:
    async def main() -> None:
        b = batcher(SlowModel(), max_items=1)
        running = asyncio.create_task(b.submit(1, num_tokens=1))
        waiting = asyncio.create_task(b.submit(2, num_tokens=1))
        await asyncio.sleep(0.1)
        await b.close()
        assert await running == 2
        with pytest.raises(ModelStoppedError, match="stopped before it answered"):
            await waiting
        with pytest.raises(ModelStoppedError, match="being stopped"):
            await b.submit(3, num_tokens=1)

    run_virtual(main())


def test_an_event_loop_that_ends_is_not_held_up() -> None:
    async def main() -> None:
        b = batcher(SlowModel(batch_s=1e9))
        asyncio.get_running_loop().create_task(b.submit(1, num_tokens=1))
        await asyncio.sleep(1)

    run_virtual(main())


class StepwiseModel:
    """Takes as many steps over an item as its number says; items enter and leave between steps."""

    takes_more = True

    def __init__(self, step_s: float = 1.0) -> None:
        self.step_s = step_s
        self.left: dict[int, int] = {}
        self.started: list[tuple[float, int]] = []
        self.widest = 0
        self.hurried = asyncio.Event()

    def start(self, options: Mapping[str, Any]) -> StepwiseModel:
        return self

    def hurry(self) -> None:
        self.hurried.set()

    async def advance(self, entering: Sequence[Entering[int]], leaving: Collection[int]) -> list[Ended[int]]:
        self.hurried.clear()
        for key in leaving:
            del self.left[key]
        for each in entering:
            self.left[each.key] = each.item
            self.started.append((asyncio.get_running_loop().time(), each.item))
        self.widest = max(self.widest, len(self.left))
        while self.left:
            await asyncio.sleep(self.step_s)
            self.left = {key: left - 1 for key, left in self.left.items()}
            ended = [key for key, left in self.left.items() if left == 0]
            for key in ended:
                del self.left[key]
            if ended or self.hurried.is_set():
                return [Ended(key, key) for key in ended]
        return []


def stepwise(model: StepwiseModel, max_items: int = 8, **options: Any) -> Batcher[int, int]:
    return Batcher(model.start, BatchLimits(max_items, 8192), **options)


def test_an_item_enters_while_others_are_in_work_and_is_answered_before_them() -> None:
    model, ended = StepwiseModel(), []

    async def main() -> None:
        b, loop = stepwise(model), asyncio.get_running_loop()

        async def ask(steps: int, at_s: float) -> None:
            await asyncio.sleep(at_s)
            await b.submit(steps, num_tokens=1)
            ended.append((steps, loop.time()))

        await asyncio.gather(ask(10, 0), ask(2, 3.5), ask(3, 3.6))

    run_virtual(main())
    assert model.started == [(0, 10), (4, 2), (4, 3)]
    assert ended == [(2, 6), (3, 7), (10, 10)]


def test_an_item_in_work_that_nobody_waits_for_makes_room_for_the_next() -> None:
    model = StepwiseModel()

    async def main() -> float:
        b = stepwise(model, max_items=1)
        first = asyncio.create_task(b.submit(1000, num_tokens=1))
        second = asyncio.create_task(b.submit(2, num_tokens=1))
        await asyncio.sleep(4.5)
        first.cancel()
        await second
        return asyncio.get_running_loop().time()

    assert run_virtual(main()) == 7
    assert model.left == {}


def test_bulk_items_leave_room_for_interactive_ones() -> None:
    model = StepwiseModel()

    async def main() -> list[float]:
        b, loop = stepwise(model, max_items=16), asyncio.get_running_loop()
        bulk = [asyncio.create_task(b.submit(100, num_tokens=1, lane=Lane.BULK)) for _ in range(40)]
        await asyncio.sleep(4.5)
        await b.submit(1, num_tokens=1)
        asked_s = loop.time()
        await asyncio.gather(*bulk)
        return [asked_s]

    assert run_virtual(main()) == [6]  # it begins with the next step, and ends with it
    assert model.widest == 14 + 2  # one of them interactive


def test_bulk_items_enter_beside_interactive_ones_where_each_ends_for_itself() -> None:
    model = StepwiseModel()

    async def main() -> None:
        b = stepwise(model, max_items=4)
        first = asyncio.create_task(b.submit(1, num_tokens=1))
        await asyncio.sleep(0.5)
        bulk = [b.submit(9, num_tokens=1, lane=Lane.BULK) for _ in range(2)]
        await asyncio.gather(first, *bulk, b.submit(2, num_tokens=1))

    run_virtual(main())
    assert [(at_s, steps) for at_s, steps in model.started if at_s] == [(1, 2), (1, 9), (1, 9)]


def test_others_under_other_options_are_not_kept_waiting_by_those_that_could_join() -> None:
    model = StepwiseModel()

    async def main() -> float:
        b, loop = stepwise(model, max_items=2), asyncio.get_running_loop()

        async def keep_asking() -> None:
            for _ in range(20):
                await b.submit(3, num_tokens=1)

        asking = [asyncio.create_task(keep_asking()) for _ in range(3)]
        await asyncio.sleep(1.5)
        await b.submit(1, num_tokens=1, options={"num_beams": 4})
        answered_s = loop.time()
        await asyncio.gather(*asking)
        return answered_s

    assert run_virtual(main()) <= 8


def test_a_model_that_raises_in_work_fails_what_was_in_work_and_goes_on() -> None:
    class Broken(StepwiseModel):
        async def advance(self, entering: Sequence[Entering[int]], leaving: Collection[int]) -> list[Ended[int]]:
            if any(each.item == 13 for each in entering):
                raise ValueError("thirteen")
            return await super().advance(entering, leaving)

    async def main() -> list[int | BaseException]:
        b = stepwise(Broken())
        first = asyncio.gather(b.submit(5, num_tokens=1), b.submit(13, num_tokens=1), return_exceptions=True)
        return [*await first, await b.submit(1, num_tokens=1)]

    five, thirteen, one = run_virtual(main())
    assert isinstance(five, ValueError) and isinstance(thirteen, ValueError) and isinstance(one, int)


def test_busy_seconds_grow_while_the_model_keeps_the_loop_waiting() -> None:
    async def main() -> list[float]:
        b, seen = batcher(SlowModel(batch_s=10)), []
        seen.append(b.busy_s)
        asking = asyncio.create_task(b.submit(1, num_tokens=7))
        await asyncio.sleep(4)
        seen += [b.busy_s, b.num_running_tokens]
        await asking
        await asyncio.sleep(1)
        return [*seen, b.busy_s, b.num_running_tokens]

    assert run_virtual(main()) == [0, 4, 7, 0, 0]


def test_a_batch_that_takes_too_long_is_trouble_until_it_ends() -> None:
    async def main() -> list[str | None]:
        b, seen = batcher(SlowModel(batch_s=10)), []
        seen.append(b.trouble(limit_s=5))
        asking = asyncio.create_task(b.submit(1, num_tokens=1))
        for _ in range(2):
            await asyncio.sleep(4)
            seen.append(b.trouble(limit_s=5))
        await asking
        return [*seen, b.trouble(limit_s=5)]

    stuck = "the model has been at one batch for 8 s; the limit is 5 s"
    assert run_virtual(main()) == [None, None, stuck, None]


def test_a_loop_that_has_ended_is_trouble_and_the_next_item_begins_another() -> None:
    num_steps = 0

    def cancel_the_first(num_items: int, num_tokens: int) -> None:
        nonlocal num_steps
        num_steps += 1
        if num_steps == 1:
            raise asyncio.CancelledError  # as from outside: the loop takes it for its own end

    async def main() -> None:
        b = batcher(SlowModel(), on_step=cancel_the_first)
        with pytest.raises(ModelStoppedError):
            await b.submit(1, num_tokens=1)
        await asyncio.sleep(1)
        assert b.trouble(limit_s=5) == "the batcher's loop has ended"
        assert await b.submit(2, num_tokens=1) == 4
        assert b.trouble(limit_s=5) is None
        await b.close()
        assert b.trouble(limit_s=5) is None

    run_virtual(main())


def test_similar_lengths_are_chosen_around_the_oldest_item() -> None:
    lengths = [10, 100, 11, 9, 50, 10]
    assert sorted(choose_batch(lengths, [0] * 6, BatchLimits(4, 8192))) == [0, 2, 3, 5]
    assert choose_batch([500, 1, 1], [0] * 3, BatchLimits(4, 100)) == [0]
    assert choose_batch([10, 1, 1], [0] * 3, BatchLimits(4, 100), present=[10, 10]) == [0, 1]
    assert choose_batch([10], [0], BatchLimits(4, 100), present=[10] * 4) == []
    assert choose_batch([60], [0], BatchLimits(4, 100), present=[1]) == []


def test_cut_batches_hold_each_item_once_within_the_limits() -> None:
    lengths = [3, 50, 7, 7, 200, 1, 9]
    batches = cut_batches(lengths, BatchLimits(max_items=3, max_tokens=60))
    assert sorted(i for batch in batches for i in batch) == list(range(7))
    assert batches[0] == [4]
    for batch in batches:
        assert len(batch) <= 3
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= 60
