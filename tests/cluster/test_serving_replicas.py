"""Replicas that are killed one after the other while requests run: nothing is lost, doubled or different."""

from __future__ import annotations

import concurrent.futures
import itertools
import json
import signal
import threading
from collections.abc import Iterator

import httpx
import pytest
from serving_load import History, Server, kill_each_replica, model_replicas, post_in_two, wait_ready, wait_replicas
from serving_models import echo, translation

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NUM_SENTENCES = 10_000
TWO = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.25}}
SENTENCES = [f"on the {number % 31} of July, at {number} hours" for number in range(NUM_SENTENCES)]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    # Small chunks: a kill meets many, and each is soon done again.
    en_fr = translation("en-fr", "fr", **TWO, bulk={"chunk_items": 50}, max_new_tokens=32)
    server = Server(tmp_path_factory.mktemp("replicas"), en_fr, echo("own", 0.02, **TWO, max_body_bytes=200_000))
    yield server
    assert server.stop() == []


def bulk(server: Server, headers: dict[str, str]) -> bytes:
    with httpx.Client(timeout=600) as client:
        response = client.post(server.url + "/v1/translate", json={"text": SENTENCES}, headers=headers)
    assert response.status_code == 200, response.text[:500]
    return response.content


@pytest.mark.parametrize("headers", [{}, {"accept": "application/x-ndjson"}], ids=["whole", "lines"])
def test_a_bulk_answer_is_the_same_bytes_when_every_replica_is_killed_in_turn(
    server: Server, headers: dict[str, str]
) -> None:
    wait_ready(server.url)
    undisturbed = bulk(server, headers)
    assert undisturbed.count(b'"text"') == NUM_SENTENCES
    replicas = [process for process in wait_replicas(server.pid, 4) if "en-fr" in " ".join(process.cmdline())]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        disturbed = pool.submit(bulk, server, headers)
        num_killed = 0
        for process in replicas:
            threading.Event().wait(0.3)
            if disturbed.done():
                break
            process.send_signal(signal.SIGKILL)
            num_killed += 1
        assert disturbed.result(600) == undisturbed
    assert num_killed == 2, "the request was over before every replica was killed"


@pytest.mark.parametrize("num_bytes", [100, 100_000])
def test_every_replica_killed_in_turn_under_load_loses_doubles_and_confuses_nothing(
    server: Server, num_bytes: int
) -> None:
    if server.front != "haproxy":
        pytest.skip("the front of this platform does not send a request again")
    wait_ready(server.url)
    history, stop, numbers = History(), threading.Event(), itertools.count()
    padding = "x" * num_bytes

    def load() -> None:
        while not stop.is_set():
            number = next(numbers)
            body = json.dumps({"inputs": [{"value": number, "padding": padding}]}).encode()
            try:
                status, answer = post_in_two(server.url + "/v1/predict", body)
                value = json.loads(answer)["predictions"][0]["value"] if status == 200 else None
                history.record(number, "right" if value == number else f"{status}: {answer[:200]!r}")
            except (OSError, ValueError, IndexError) as error:
                history.record(number, repr(error))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        running = [pool.submit(load) for _ in range(8)]
        try:
            killed = kill_each_replica(server.pid, pause_s=3)
            threading.Event().wait(3)
        finally:
            stop.set()
        for each in running:
            each.result(120)
    assert len(killed) == 4 and not set(killed) & {process.pid for process in model_replicas(server.pid)}
    assert history.failures() == {}
    assert len(history.outcomes) == next(numbers) > 100
