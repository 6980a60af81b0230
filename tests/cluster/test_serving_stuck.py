"""A model that never comes back: its replica says so when it is asked, and is replaced."""

from __future__ import annotations

import time

import httpx
import pytest
from serving_load import Server, model_replicas, wait_ready, wait_replicas
from serving_models import echo

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

HANGS = -1.0
TIMEOUT_S = 1.0


def ask(server: Server, value: float) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/predict", json={"inputs": [{"value": value}]}, timeout=60)


def test_a_replica_whose_model_hangs_is_replaced(tmp_path_factory: pytest.TempPathFactory) -> None:
    serve = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.25}, "request_timeout_s": TIMEOUT_S}
    server = Server(tmp_path_factory.mktemp("stuck"), echo("own", **serve))
    try:
        before = {process.pid for process in wait_replicas(server.pid, 2)}
        hung = ask(server, HANGS)
        assert (hung.status_code, hung.json()["error"]["code"]) == (503, "timeout")
        began = time.monotonic()
        while len(before & {process.pid for process in model_replicas(server.pid)}) == 2:
            assert time.monotonic() - began < 60, "the replica that hangs is still there"
            time.sleep(0.1)
        gone_s = time.monotonic() - began
        after = {process.pid for process in wait_replicas(server.pid, 2)}
        wait_ready(server.url)
        answers = [ask(server, number) for number in range(20)]
    finally:
        assert server.stop() == []
    assert len(before & after) == 1 and gone_s > TIMEOUT_S, "one was replaced, and not before its time"
    assert [answer.json()["predictions"][0]["value"] for answer in answers] == list(range(20))
    assert {answer.json()["predictions"][0]["pid"] for answer in answers} <= after
