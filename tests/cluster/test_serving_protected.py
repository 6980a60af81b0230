"""A server that a network can reach: keys on every port that answers, TLS at its front, no key in sight."""

from __future__ import annotations

import json
import os
import signal
import ssl
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import trustme
from serving_models import Command, commit, echo, family, wait_gone, write_file

pytestmark = pytest.mark.slow
FOLLOWED_WITHIN_S = 5.0
LOOPBACK = ("127.0.0.1", "::1", "::ffff:127.0.0.1")


@dataclass(frozen=True)
class Protected:
    url: str
    info: dict[str, Any]
    pid: int
    command: Command
    trust: ssl.SSLContext
    keys: dict[str, str]

    def post(self, key: str | None, inputs: list[Any], url: str | None = None) -> httpx.Response:
        headers = {} if key is None else {"authorization": f"Bearer {self.keys.get(key, key)}"}
        return httpx.post(
            (url or self.url) + "/v1/predict",
            json={"inputs": inputs},
            headers=headers,
            verify=self.trust,
            timeout=30,
        )


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Protected]:
    folder = tmp_path_factory.mktemp("protected")
    two = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.25}}
    file = echo("own", 0.0, **two)
    commit(file, folder / "store")
    path = write_file({**file, "store": str(folder / "store")}, folder)
    authority = trustme.CA()
    certificate = authority.issue_cert("localhost", "127.0.0.1")
    certificate.private_key_pem.write_to_path(folder / "key.pem")
    for part in certificate.cert_chain_pems:
        part.write_to_path(folder / "chain.pem", append=True)
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    command = Command(folder / "home")
    refused = command.run("serve", str(path), "--host", "0.0.0.0", "--port", "0", "--json")
    assert (refused.returncode, "has no keys" in refused.stdout) == (2, True)
    keys = {}
    for words in (
        ["all"],
        ["slow", "--tokens-per-s", "1"],
        ["other", "--scope", "translate"],
        ["ops", "--scope", "metrics"],
    ):
        keys[words[0]] = json.loads(command.run("keys", "add", *words, "--json").stdout)["key"]
    process, info = command.serve(
        str(path),
        "--host",
        "0.0.0.0",
        "--tls-cert",
        str(folder / "chain.pem"),
        "--tls-key",
        str(folder / "key.pem"),
    )
    everything = family(process.pid)
    yield Protected(info["url"], info, process.pid, command, trust, keys)
    everything = list({each.pid: each for each in [*everything, *family(process.pid)]}.values())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert wait_gone(everything) == []
    assert process.stdout is not None
    process.stdout.close()


def test_a_key_is_needed_and_its_scopes_hold(server: Protected) -> None:
    assert server.url.startswith("https://") and server.info["has_keys"]
    statuses = {who: server.post(who, [1]).status_code for who in (None, "er_wrong", "all", "other")}
    assert statuses == {None: 401, "er_wrong": 401, "all": 200, "other": 403}
    for path, status in (("/healthz", 200), ("/readyz", 200), ("/v1/models", 401), ("/metrics", 401)):
        assert httpx.get(server.url + path, verify=server.trust).status_code == status, path


def test_keys_hold_on_every_port_that_answers(server: Protected) -> None:
    ports: set[int] = set()
    for process in family(server.pid):
        with suppress(psutil.NoSuchProcess):
            listening = [each for each in process.net_connections("tcp") if each.status == psutil.CONN_LISTEN]
            ports.update(each.laddr.port for each in listening)
    answers: dict[int, int] = {}
    for port in ports:
        try:
            answers[port] = server.post(None, [1], f"http://127.0.0.1:{port}").status_code
        except httpx.HTTPError:
            continue  # not HTTP: Ray's own, which ask for their token
    # Both replicas, the edge, and the proxy that HAProxy falls back to; HAProxy's statistics know no such path.
    assert list(answers.values()).count(401) >= 4, answers
    assert 200 not in answers.values(), answers


def test_the_front_alone_is_open_to_the_network(server: Protected) -> None:
    def beyond_loopback() -> set[int]:
        found: set[int] = set()
        for process in family(server.pid):
            with suppress(psutil.NoSuchProcess):
                for each in process.net_connections("tcp"):
                    if each.status == psutil.CONN_LISTEN and each.laddr.ip not in LOOPBACK:
                        found.add(each.laddr.port)
        return found

    # HAProxy may be just being replaced.
    _until(lambda: beyond_loopback() == {httpx.URL(server.url).port})


def test_a_certificate_of_nobody_is_not_trusted(server: Protected) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE"):
        httpx.get(server.url + "/healthz")


def test_a_rate_is_shared_by_the_replicas(server: Protected) -> None:
    deadline = time.monotonic() + 30
    statuses: list[int] = []
    while time.monotonic() < deadline and statuses.count(429) < 4:
        response = server.post("slow", [1] * 20)
        statuses.append(response.status_code)
        if response.status_code == 429:
            assert int(response.headers["retry-after"]) >= 1
            assert response.json()["error"]["code"] == "rate_limited"
    assert 200 in statuses and statuses.count(429) >= 4
    assert server.post("all", [1]).status_code == 200


def test_a_removed_key_is_refused_within_seconds_by_every_replica(server: Protected) -> None:
    key = json.loads(server.command.run("keys", "add", "brief", "--json").stdout)["key"]
    _until(lambda: {server.post(key, [1]).status_code for _ in range(8)} == {200})
    server.command.run("keys", "remove", "brief")
    _until(lambda: {server.post(key, [1]).status_code for _ in range(8)} == {401})


def test_no_key_is_in_sight(server: Protected) -> None:
    server.post("all", [1])
    time.sleep(1.5)
    secrets = [*server.keys.values()]
    for process in family(server.pid):
        with suppress(psutil.NoSuchProcess):
            words = " ".join(process.cmdline()) + json.dumps(process.environ())
            assert not any(secret in words for secret in secrets), process
    log = Path(server.info["access_log"]).read_text()
    lines = [json.loads(line) for line in log.splitlines()]
    assert {"all", "slow"} <= {line["key"] for line in lines} and "address" not in lines[0]
    home = server.command.home
    for path in (path for path in home.rglob("*") if path.is_file()):
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    (record,) = json.loads(server.command.run("serve", "status", "--json").stdout)["servers"]
    for path in Path(record["folder"]).rglob("*.log"):
        assert not any(secret.encode() in path.read_bytes() for secret in secrets), path
    assert os.stat(home / "keys.json").st_mode & 0o077 == 0


def test_a_large_request_is_in_the_account_of_the_key_that_asked(server: Protected) -> None:
    headers = {"authorization": f"Bearer {server.keys['all']}", "x-request-id": "large"}
    body = {"inputs": [1] * 2000}
    answer = httpx.post(server.url + "/v1/predict", json=body, headers=headers, verify=server.trust, timeout=60)
    assert (answer.status_code, len(answer.json()["predictions"])) == (200, 2000)

    def is_told() -> bool:
        log = Path(server.info["access_log"])
        lines = log.read_text().splitlines() if log.exists() else []
        found = [line for line in map(json.loads, lines) if line["id"] == "large"]
        return [(line["items"], line["key"], line["model"]) for line in found] == [(2000, "all", "own")]

    _until(is_told)


def test_the_edge_gathers_what_its_replicas_counted(server: Protected) -> None:
    def both() -> bool:
        response = httpx.get(server.url + "/metrics", auth=("prometheus", server.keys["ops"]), verify=server.trust)
        found = [line for line in response.text.splitlines() if line.startswith("eagleray_items_total")]
        # The edge has counted a large request of its own.
        return response.status_code == 200 and sum('lane="interactive"' in line for line in found) == 2

    for number in range(40):
        server.post("all", [number])
    _until(both)


def _until(holds: Any) -> None:
    deadline = time.monotonic() + FOLLOWED_WITHIN_S
    while not holds():
        assert time.monotonic() < deadline, "not within seconds"
        time.sleep(0.1)
