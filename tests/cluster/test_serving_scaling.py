"""Replicas that come and go with the load, and more load than replicas can bear; no request fails of it."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import httpx
import pytest
from serving_load import Server, model_replicas
from serving_models import echo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

SMALL = {"ray_actor_options": {"num_cpus": 0.25}, "max_batch_size": 4}
SCALING = {
    "min_replicas": 0, "initial_replicas": 1, "max_replicas": 3,
    "target_queued_tokens": 20, "downscale_delay_s": 4,
}  # fmt: skip
WAIT_S = 180.0
LOADED_S = 15.0


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(
        tmp_path_factory.mktemp("scaling"), echo("elastic", 0.05, **SMALL, autoscaling_config=SCALING),
        echo("narrow", 0.05, **SMALL, num_replicas=1, max_queued_tokens=40),
        echo("few", 0.05, **SMALL, num_replicas=1, max_ongoing_requests=8),
    )  # fmt: skip
    yield server
    assert server.stop() == []


@dataclass
class Outcome:
    statuses: collections.Counter[int | str] = field(default_factory=collections.Counter)
    seconds: list[float] = field(default_factory=list)
    refused_s: list[float] = field(default_factory=list)
    codes: set[str] = field(default_factory=set)
    retry_after: set[str | None] = field(default_factory=set)
    num_wrong: int = 0


@contextmanager
def load(url: str, num_clients: int) -> Iterator[Outcome]:
    """Ask for five items again and again, from so many clients, and check every answer."""
    outcome, stop, numbers = Outcome(), threading.Event(), itertools.count()

    def ask() -> None:
        with httpx.Client(timeout=120) as client:
            while not stop.is_set():
                inputs = [next(numbers)] * 5
                begin = time.monotonic()
                try:
                    response = client.post(url, json={"inputs": inputs})
                except httpx.HTTPError as error:
                    outcome.statuses[repr(error)] += 1
                    continue
                outcome.statuses[response.status_code] += 1
                if response.status_code == 200:
                    outcome.seconds.append(time.monotonic() - begin)
                    values = [each["value"] for each in response.json()["predictions"]]
                    outcome.num_wrong += values != inputs
                else:
                    outcome.refused_s.append(time.monotonic() - begin)
                    outcome.retry_after.add(response.headers.get("retry-after"))
                    outcome.codes.add(response.json()["error"]["code"])

    with concurrent.futures.ThreadPoolExecutor(num_clients) as pool:
        running = [pool.submit(ask) for _ in range(num_clients)]
        try:
            yield outcome
        finally:
            stop.set()
        for each in running:
            each.result(180)


def replicas(server: Server, name: str) -> dict[str, Any]:
    models = httpx.get(server.url + "/v1/models", timeout=30).json()["models"]
    found: dict[str, Any] = next(model["replicas"] for model in models if model["name"] == name)
    return found


def wait_for(server: Server, condition: Callable[[dict[str, Any]], bool]) -> float:
    """Wait until the replicas of the elastic model are as wanted; return the seconds."""
    begin = time.monotonic()
    while not condition(shown := replicas(server, "elastic")):
        assert time.monotonic() - begin < WAIT_S, shown
        time.sleep(0.1)
    return time.monotonic() - begin


def test_replicas_come_with_the_load_go_with_it_and_come_back_without_a_failed_request(server: Server) -> None:
    url = server.url + "/v1/predict/elastic"
    with load(url, 24) as many:
        decided_s = wait_for(server, lambda shown: shown["running"] + shown["starting"] > 1)
        ready_s = wait_for(server, lambda shown: shown["running"] > 1)
        wait_for(server, lambda shown: shown["running"] == 3)
        shown = replicas(server, "elastic")["autoscaling"]
        assert shown["wanted_replicas"] >= 3 and shown["target_queued_tokens"] == 20
    print(f"decided after {decided_s:.1f} s, another replica after {decided_s + ready_s:.1f} s")
    with load(url, 1) as few:
        wait_for(server, lambda shown: shown["running"] == 1)
    wait_for(server, lambda shown: shown["running"] == 0)
    begin = time.monotonic()
    woken = httpx.post(url, json={"inputs": [1]}, timeout=120)
    print(f"woken after {time.monotonic() - begin:.1f} s")
    assert woken.status_code == 200
    for outcome in (many, few):
        assert set(outcome.statuses) == {200} and outcome.num_wrong == 0, outcome.statuses


def test_beyond_its_capacity_a_model_refuses_at_once_and_answers_the_rest_in_bounded_time(server: Server) -> None:
    url = server.url + "/v1/predict/narrow"
    (replica,) = [each for each in model_replicas(server.pid) if "model-narrow" in " ".join(each.cmdline())]
    with load(url, 1):
        time.sleep(2)
    before = replica.memory_info().rss
    with load(url, 40) as outcome:  # 200 items at once where 4 are answered in 50 ms and 40 may wait
        time.sleep(LOADED_S)
    assert set(outcome.statuses) == {200, 429} and outcome.num_wrong == 0, outcome.statuses
    assert all(value is not None and 1 <= int(value) <= 60 for value in outcome.retry_after)
    ordered = sorted(outcome.seconds)
    p99 = ordered[int(0.99 * len(ordered))]
    print(f"{outcome.statuses}; accepted: p50 {median(ordered):.2f} s, p99 {p99:.2f} s, worst {ordered[-1]:.2f} s")
    print(f"refused: p50 {median(outcome.refused_s):.3f} s")
    items_per_s = 5 * len(ordered) / LOADED_S
    assert p99 < 3 * (40 + 2 * 4 + 5) / items_per_s, "what waits is bounded, and with it the time"
    assert median(outcome.refused_s) < median(ordered) / 4, "refused at once"
    assert replica.memory_info().rss - before < 64 * 2**20


def test_more_requests_at_once_than_a_replica_holds_are_answered_or_refused_in_our_shape(server: Server) -> None:
    with load(server.url + "/v1/predict/few", 40) as outcome:  # 8 at once
        time.sleep(5)
    print(f"{outcome.statuses}, {outcome.codes}")
    assert outcome.statuses[200] > 0 and set(outcome.statuses) <= {200, 429, 503}, outcome.statuses
    assert outcome.num_wrong == 0 and outcome.codes <= {"overloaded", "unavailable"}
    assert all(value is not None and int(value) >= 1 for value in outcome.retry_after)
