"""How long a refused request is told to wait."""

from __future__ import annotations

import pytest

from eagleray_serving.admission import DrainRate, overloaded


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_the_time_to_wait_is_what_waits_by_the_pace_of_the_last_seconds() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    for second in range(30):
        clock.now_s = second
        rate.add(100)
    assert rate.tokens_per_s == pytest.approx(100, rel=0.15)
    assert rate.seconds_for(2000) == pytest.approx(20, rel=0.15)


def test_the_time_to_wait_is_within_bounds_and_a_second_where_nothing_is_known() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    assert (rate.tokens_per_s, rate.seconds_for(1_000_000)) == (None, 1)
    rate.add(10)
    assert (rate.seconds_for(1), rate.seconds_for(1_000_000)) == (1, 60)
    clock.now_s = 100
    assert rate.tokens_per_s is None


def test_what_is_remembered_does_not_grow_with_the_load() -> None:
    clock = Clock()
    rate = DrainRate(clock)
    for number in range(10_000):
        clock.now_s = number / 1000
        rate.add(1)
    assert len(rate._finished) <= 10 / 0.25 + 1
    assert rate.tokens_per_s == pytest.approx(1000, rel=0.1)


def test_a_refusal_says_when_to_come_again() -> None:
    assert overloaded("too much", 7.2).headers() == {"retry-after": "8"}
