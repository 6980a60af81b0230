"""Everything that an operator does to a server, under constant load: no request may notice."""

from __future__ import annotations

import concurrent.futures
import hashlib
import secrets
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray_cluster import RayCluster, free_port
from serving_models import Command, commit, factor, write_file

from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry

NUM_CLIENTS = 6
TIMEOUT_S = 200.0
# A negative weight fails on the one, and on nothing below the other, however long the load goes on.
FATAL, SMALL = 1_000_000.0, 900
STEPS = {10: 2.0, 20: 3.0, 30: 5.0, 40: -7.0, 50: 11.0}
WEIGHTS = {f"r1-step-{step:08d}": weight for step, weight in STEPS.items()}
V10, V20, V30, V40, V50 = WEIGHTS


@dataclass
class Load:
    """Clients that ask all the time, each with an id of its own, and what they got."""

    url: str
    num_asked: int = 0
    versions: Counter[str] = field(default_factory=Counter)
    wrong: list[Any] = field(default_factory=list)
    stop: threading.Event = field(default_factory=threading.Event)

    @contextmanager
    def running(self) -> Iterator[None]:
        with concurrent.futures.ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients = [pool.submit(self._ask, client) for client in range(NUM_CLIENTS)]
            try:
                yield
            finally:
                self.stop.set()
            for client in clients:
                client.result(120)

    def _ask(self, client: int) -> None:
        number = 0
        with httpx.Client(base_url=self.url, timeout=60) as http:
            while not self.stop.is_set():
                number += 1
                # A new version is tried on first items: what a second one does to it shows under load alone.
                small = float(number % SMALL)
                values = [small, FATAL] if number % 10 == 0 else [small]
                headers = {"x-request-id": f"client-{client}-{number}"}
                try:
                    response = http.post("/v1/predict", json={"inputs": values}, headers=headers)
                    answer = response.json()
                    version, found = answer["version"], [each["value"] for each in answer["predictions"]]
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    self.wrong.append((repr(error), getattr(error, "response", None)))
                    continue
                self.num_asked += 1
                self.versions[version] += 1
                expected = [value * WEIGHTS.get(version, 0) for value in values]
                if response.status_code != 200 or found != expected:
                    self.wrong.append((response.status_code, version, expected, found))

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait, under load, until something is so, and for some requests more."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not happen in time; wrong answers: {self.wrong[:3]}"
            time.sleep(0.1)
        seen = self.num_asked
        while self.num_asked < seen + 200:
            assert time.monotonic() < deadline, f"no load after {what}; wrong: {self.wrong[:3]}"
            time.sleep(0.1)
        assert self.wrong == [], what


class Operator:
    """Deploys a rendered config, and commands what it deployed."""

    def __init__(
        self, cluster: RayCluster, environment: dict[str, str], config: dict[str, Any], path: Path
    ) -> None:
        self._cluster = cluster
        self._environment = environment
        self.config = config
        self._path = path
        self._token = secrets.token_hex(16)
        config["applications"][-1]["args"]["token_sha256"] = hashlib.sha256(self._token.encode()).hexdigest()
        self.url = ""

    def deploy(self) -> None:
        self._path.write_text(yaml.safe_dump(self.config))
        self._serve("deploy", str(self._path))
        headers = {"authorization": f"Bearer {self._environment['RAY_AUTH_TOKEN']}"}
        details = httpx.get(
            f"{self._cluster.dashboard}/api/serve/applications/", headers=headers, timeout=30
        ).json()
        self.url = f"http://127.0.0.1:{details['http_options']['port']}"

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                if httpx.get(f"{self.url}/readyz", timeout=10).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # the front is not there yet
            time.sleep(0.2)
        raise AssertionError("the server was not ready in time")

    def shut_down(self) -> None:
        self._serve("shutdown", "-y")

    def _serve(self, *words: str) -> None:
        serve = str(Path(sys.executable).with_name("serve"))
        command = [serve, words[0], "--address", self._cluster.dashboard, *words[1:]]
        subprocess.run(command, env=self._environment, check=True, capture_output=True, timeout=120)

    def command(self, what: str, **body: Any) -> dict[str, Any]:
        headers = {"authorization": f"Bearer {self._token}"}
        response = httpx.post(f"{self.url}/v1/models/own/{what}", json=body, headers=headers, timeout=30)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def rollout(self) -> dict[str, Any]:
        (model,) = httpx.get(f"{self.url}/v1/models", timeout=30).json()["models"]
        found: dict[str, Any] = model["rollout"]
        return found

    def counted(self, *versions: str) -> list[int]:
        """Return the requests that versions answered in this window; those of all without a name."""
        figures = self.rollout()["requests"]
        return [figures[version]["requests"] for version in versions or figures]

    def answers_alone(self, version: str, num_replicas: int) -> Callable[[], bool]:
        return lambda: self.rollout()["replicas"] == {version: num_replicas} and not self.rollout()["canary"]


def damage(version: Path) -> None:
    """Flip a bit of a version's weights."""
    (shard,) = version.glob("*/model*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_swaps_canaries_scaling_and_a_redeploy_under_load_fail_no_request(
    ray_cluster: RayCluster, ray_environment: dict[str, str], tmp_path: Path
) -> None:
    small = {"ray_actor_options": {"num_cpus": 0.25}, "num_replicas": 2}
    file = factor("own", follow="production", follow_interval_s=0.5, **small)
    store = tmp_path / "store"
    registry = Registry(ObjectStore.open(str(store)))

    def publish(version: str) -> None:
        commit(file, store, int(version.rpartition("-")[2]), weight=WEIGHTS[version])

    def deploy_as_an_operator_does(version: str) -> None:
        registry.set_alias("own", "production", version)

    for version in WEIGHTS:
        publish(version)
    damage(store / "models" / "own" / V50)
    deploy_as_an_operator_does(V10)
    path = write_file({**file, "store": str(store)}, tmp_path)
    rendered = Command(tmp_path / "home").run("serve", "render", str(path), "--port", str(free_port()))
    assert rendered.returncode == 0, rendered.stderr
    operator = Operator(ray_cluster, ray_environment, yaml.safe_load(rendered.stdout), tmp_path / "serve.yaml")
    operator.deploy()
    try:
        operator.wait_until_ready()
        load = Load(operator.url)
        with load.running():
            load.until(operator.answers_alone(V10, 2), "the start")

            deploy_as_an_operator_does(V20)
            load.until(operator.answers_alone(V20, 2), "a followed swap")

            model = operator.config["applications"][0]
            model["deployments"][0]["num_replicas"] = 3
            operator.deploy()
            load.until(operator.answers_alone(V20, 3), "scaling up: the new replica begins with what is current")
            model["deployments"][0]["num_replicas"] = 1
            operator.deploy()
            load.until(operator.answers_alone(V20, 1), "scaling down")

            model["deployments"][0]["num_replicas"] = 2
            model["args"]["serve"]["max_batch_size"] = 32
            operator.deploy()
            load.until(operator.answers_alone(V20, 2), "a redeploy: new replicas with what was current")

            deploy_as_an_operator_does(V30)
            load.until(operator.answers_alone(V30, 2), "a second swap")
            operator.command("canary", ref="@r1-step-00000020", percent=30)
            load.until(lambda: operator.rollout()["canary"] is not None, "a canary")
            load.until(lambda: sum(operator.counted()) > 300, "the figures of both")
            canary, current = operator.counted(V20, V30)
            assert 0.2 < canary / (canary + current) < 0.4
            operator.command("promote")
            load.until(operator.answers_alone(V20, 2), "a promotion")
            operator.command("rollback")
            load.until(operator.answers_alone(V30, 2), "a rollback")

            assert registry.resolve("own@production") == f"own@{V30}", "the alias goes with what is served"

            operator.command("canary", ref=V40, percent=50)
            load.until(lambda: V40 in load.versions, "a canary that fails some requests")
            load.until(operator.answers_alone(V30, 2), "its end")
            assert "requests failed" in operator.rollout()["refused"]["reason"]

            deploy_as_an_operator_does(V50)
            load.until(lambda: operator.rollout()["refused"]["version"] == V50, "a refusal of a damaged version")
            assert "model-" in operator.rollout()["refused"]["reason"]
            load.until(operator.answers_alone(V30, 2), "and the current one goes on")
        assert load.wrong == []
        assert set(load.versions) == {V10, V20, V30, V40}
        assert load.num_asked > 2000, load.versions
    finally:
        operator.shut_down()
