"""Tokens a second per key: what a key gets, over one replica, several, and by way of the edge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from serving_fakes import EN_FR, FakeAnswerer, FakeFleet, call, service

from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.keys import ApiKey, KeyFile, new_key
from eagleray_serving.protection import Protection
from eagleray_serving.rates import BURST_S, Rates
from eagleray_serving.schema import WireError


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def key(rate: float | None) -> ApiKey:
    return new_key("a", ["translate"], rate)[1]


def use(rates: list[Rates], who: ApiKey, clock: Clock, *, seconds: float, num_tokens: int) -> int:
    """Ask the replicas in turn, a hundred times a second; return the tokens that were let in."""
    used = 0
    for step in range(int(seconds * 100)):
        clock.now += 0.01
        rate = rates[step % len(rates)]
        try:
            rate.admit(who)
        except WireError as error:
            assert (error.status, error.code) == (429, "rate_limited")
            assert error.retry_after_s is not None and error.retry_after_s >= 1
            continue
        rate.charge(who, num_tokens)
        used += num_tokens
    return used


@pytest.mark.parametrize("num_replicas", [1, 2, 5])
def test_a_key_gets_its_rate_however_many_replicas_share_it(num_replicas: int) -> None:
    clock, who = Clock(), key(100.0)
    rates = [Rates(clock) for _ in range(num_replicas)]
    for each in rates:
        each.num_sharers = num_replicas
    seconds, num_tokens = 200.0, 7
    used = use(rates, who, clock, seconds=seconds, num_tokens=num_tokens)
    allowed = 100.0 * (seconds + BURST_S)
    assert 0.97 * allowed <= used <= allowed + num_replicas * num_tokens


def test_a_key_without_a_rate_and_nobody_are_never_refused() -> None:
    clock = Clock()
    rates = Rates(clock)
    for who in (None, key(None)):
        rates.charge(who, 10**9)
        rates.admit(who)


def test_a_large_request_is_let_in_and_leaves_a_debt_that_is_paid_back_first() -> None:
    clock, who = Clock(), key(10.0)
    rates = Rates(clock)
    rates.admit(who)
    rates.charge(who, 1100)  # the bucket holds 100
    with pytest.raises(WireError) as caught:
        rates.admit(who)
    assert caught.value.retry_after_s == pytest.approx(100.0)
    clock.now += 99
    with pytest.raises(WireError):
        rates.admit(who)
    clock.now += 2
    rates.admit(who)


def test_more_replicas_mean_less_for_each() -> None:
    clock, who = Clock(), key(100.0)
    rates = Rates(clock)
    rates.charge(who, 1000)
    rates.num_sharers = 4
    clock.now += 1
    with pytest.raises(WireError) as caught:
        rates.charge(who, 75)
        rates.admit(who)
    assert caught.value.retry_after_s == pytest.approx(2.0)


class CountingAnswerer(FakeAnswerer):
    """Says that an item has ten tokens."""

    async def answer(self, items, options, asking):  # type: ignore[no-untyped-def]
        from dataclasses import replace

        return replace(await super().answer(items, options, asking), num_tokens=10 * len(items))


def test_what_enters_by_the_edge_is_charged_there_and_where_it_is_answered(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    secret, kept = new_key("a", ["translate"], 10.0)
    file.add(kept)
    gates = [Gate(Protection(keys=str(file.path))) for _ in range(2)]
    model = service(EN_FR, CountingAnswerer())
    model.gate = gates[0]
    fleet = FakeFleet({EN_FR.name: model})
    edge = Edge([EN_FR], fleet, max_body_bytes=10_000, body_timeout_s=1, gate=gates[1]).application()
    headers = {"authorization": f"Bearer {secret}"}
    body = json.dumps({"text": ["a"] * 11}).encode()  # 110 tokens: more than a bucket of ten seconds
    statuses = [call(edge, "POST", "/v1/translate", body, headers).status_code for _ in range(3)]
    assert statuses == [200, 429, 429]
    refused = call(model.application(), "POST", "/v1/translate", body, headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limited")
    assert int(refused.headers["retry-after"]) >= 1
