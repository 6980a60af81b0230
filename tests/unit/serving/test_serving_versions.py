"""Several versions in one replica: which one answers, and how one takes over from another."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from version_fakes import FakeLoaded, ask

from eagleray_serving.answering import Answers, ItemFailure
from eagleray_serving.figures import Figures, total
from eagleray_serving.schema import WireError
from eagleray_serving.split import Split, position
from eagleray_serving.versions import Versions


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


def test_an_id_meets_the_same_version_on_every_replica_and_a_larger_canary_keeps_its_own() -> None:
    ids = [f"request-{number}" for number in range(10_000)]
    ten, thirty = Split("v1", "v2", 10), Split("v1", "v2", 30)
    share = [ten.choose(id) for id in ids].count("v2") / len(ids)
    assert abs(share - 0.1) < 0.01
    assert all(thirty.choose(id) == "v2" for id in ids if ten.choose(id) == "v2")
    assert {Split("v1", "v2", 100).choose(id) for id in ids} == {"v2"}
    assert {Split("v1", "v2", 0).choose(id) for id in ids} == {Split("v1").choose("a")} == {"v1"}
    # printf request-1 | sha256sum | cut -c 1-16, divided by 2 ** 64: no release may spread ids anew.
    assert position("request-1") == pytest.approx(0x19F1064B619D49D3 / 2**64, abs=1e-9)


def test_requests_end_on_the_version_that_admitted_them_and_then_it_goes() -> None:
    async def swap() -> None:
        old, new = FakeLoaded("v1"), FakeLoaded("v2")
        versions = Versions(old)
        old.go.clear()
        begun = [asyncio.create_task(ask(versions, f"a{number}")) for number in range(5)]
        await asyncio.sleep(0)
        versions.add(new)
        versions.route(Split("v2"))
        retired = asyncio.create_task(versions.retire("v1"))
        await asyncio.sleep(0)
        assert (await ask(versions, "b")).version == "v2"
        assert (retired.done(), old.closed, versions.loaded) == (False, False, ("v2",))
        old.go.set()
        assert [(await each).version for each in begun] == ["v1"] * 5
        await retired
        assert old.closed and not new.closed

    run(swap)


def test_requests_wait_while_no_version_is_loaded() -> None:
    async def swap_in_place() -> None:
        versions = Versions(FakeLoaded("v1"))
        versions.hold()
        waiting = asyncio.create_task(ask(versions, "a"))
        await versions.retire("v1")
        assert not waiting.done()
        versions.add(FakeLoaded("v2"))
        versions.route(Split("v2"))
        assert (await waiting).version == "v2"

    run(swap_in_place)


def failing_item() -> Answers:
    return Answers("v2", [ItemFailure("model_failed", "it failed")])


def raising() -> Answers:
    raise RuntimeError("out of order")


def unavailable() -> Answers:
    raise WireError(503, "unavailable", "it was stopped", "try again")


@pytest.mark.parametrize("fault", [failing_item, raising, unavailable])
def test_what_a_canary_fails_the_current_version_answers_and_it_is_counted(fault: Callable[[], Answers]) -> None:
    async def canary() -> None:
        versions = Versions(FakeLoaded("v1"))
        versions.add(FakeLoaded("v2", fault))
        versions.route(Split("v1", "v2", 50))
        answers = [await ask(versions, f"r{number}") for number in range(40)]
        assert {answer.version for answer in answers} == {"v1"}
        figures = versions.figures()
        num_canary = sum(position(f"r{number}") < 0.5 for number in range(40))
        assert (figures["v2"].requests, figures["v2"].errors) == (num_canary, num_canary)
        assert (figures["v1"].requests, figures["v1"].errors) == (40, 0)
        versions.reset_figures()
        assert versions.figures()["v2"].requests == 0

    run(canary)


def test_what_is_the_clients_own_fault_is_no_error_of_a_version() -> None:
    def overloaded() -> Answers:
        raise WireError(429, "overloaded", "too much", "later")

    async def refuse() -> None:
        versions = Versions(FakeLoaded("v1", lambda: Answers("v1", [ItemFailure("too_long", "it is long")])))
        await ask(versions, "a")
        versions.add(FakeLoaded("v2", overloaded))
        versions.route(Split("v1", "v2", 100))
        with pytest.raises(WireError, match="too much"):
            await ask(versions, "b")
        assert [(each.requests, each.errors) for each in versions.figures().values()] == [(1, 0), (0, 0)]

    run(refuse)


def test_a_request_that_runs_into_its_time_limit_is_an_error_and_one_that_is_given_up_is_not() -> None:
    async def hang() -> None:
        versions = Versions(hanging := FakeLoaded("v1"), timeout_s=0.05)
        hanging.go.clear()
        given_up = asyncio.create_task(ask(versions, "a"))
        await asyncio.sleep(0)
        given_up.cancel()
        with pytest.raises(asyncio.CancelledError):
            await given_up
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(ask(versions, "b"), 0.05)
        assert (versions.figures()["v1"].requests, versions.figures()["v1"].errors) == (1, 1)

    run(hang)


def test_figures_of_replicas_add_up_and_keep_percentiles_within_a_quarter() -> None:
    parts = [Figures(), Figures()]
    for number in range(1, 1001):
        parts[number % 2].add(number / 1000, is_error=number % 100 == 0)
    summed = total(parts)
    assert (summed.requests, summed.errors, summed.error_rate) == (1000, 10, 0.01)
    for share in (0.5, 0.95, 0.99):
        found = summed.percentile_s(share)
        assert found is not None and share <= found <= share * 1.25
    assert Figures().percentile_s(0.5) is None
    assert Figures().as_json() == {"requests": 0, "errors": 0, "p50_ms": None, "p95_ms": None}


def test_trouble_of_any_version_is_that_of_the_replica_also_of_one_on_its_way_out() -> None:
    async def trouble() -> None:
        old, new = FakeLoaded("v1"), FakeLoaded("v2")
        versions = Versions(old)
        versions.add(new)
        assert versions.trouble is None
        new.trouble = "it hangs"
        assert versions.trouble == "v2: it hangs"
        new.trouble, old.trouble = None, "it hangs, too"
        old.go.clear()
        asking = asyncio.create_task(ask(versions, "a"))
        await asyncio.sleep(0)
        versions.route(Split("v2"))
        retiring = asyncio.create_task(versions.retire("v1"))
        await asyncio.sleep(0)
        assert versions.loaded == ("v2",) and versions.trouble == "v1: it hangs, too"
        old.go.set()
        await asyncio.gather(asking, retiring)
        assert versions.trouble is None

    run(trouble)
