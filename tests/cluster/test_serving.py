"""`eagleray serve` as a user runs it: a server of its own over HTTP, one for the whole module."""

from __future__ import annotations

import concurrent.futures
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving_models import Command, commit, echo, family, translation, wait_gone, wait_until, write_file

from eagleray_serving.commanding import Commander, answers_alone, divides_for
from eagleray_serving.home import Home
from eagleray_serving.split import Split

SLEEP_S = 0.02
POST = b"POST /v1/predict HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
GET = b"GET /v1/predict HTTP/1.1\r\nhost: x\r\n"


@dataclass(frozen=True)
class Running:
    url: str
    info: dict[str, Any]
    pid: int
    command: Command


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and files of three models."""
    folder = tmp_path_factory.mktemp("models")
    two = {"num_replicas": 2, "ray_actor_options": {"num_cpus": 0.25}, "max_body_bytes": 100_000}
    small = {"ray_actor_options": {"num_cpus": 0.25}, "max_item_characters": 500}
    for file in (
        translation("en-fr", "fr", **small),
        translation("en-de", "de", **small),
        echo("own", SLEEP_S, **two),
    ):
        commit(file, folder / "store")
        write_file({**file, "store": str(folder / "store")}, folder)
    return folder


@pytest.fixture(scope="module")
def server(models: Path) -> Iterator[Running]:
    """All three behind one front, in the foreground."""
    command = Command(models / "home")
    process, info = command.serve(*(str(models / f"{name}.yaml") for name in ("en-fr", "en-de", "own")))
    everything = family(process.pid)
    yield Running(info["url"], info, process.pid, command)
    everything = list({each.pid: each for each in [*everything, *family(process.pid)]}.values())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, "Ctrl-C is the normal end of a server"
    assert wait_gone(everything) == []
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=30) as client:
        yield client


def test_each_model_answers_with_its_name_and_version(client: httpx.Client) -> None:
    french = client.post("/v1/translate/en-fr", json={"text": ["6 July", "7 July"]}).json()
    assert (french["model"], french["version"], len(french["translations"])) == ("en-fr", "r1-step-00000010", 2)
    own = client.post("/v1/predict", json={"inputs": [1.5, {"value": 2}]}).json()
    assert [each["value"] for each in own["predictions"]] == [1.5, 2.0]
    assert client.post("/v1/predict/own", json={"inputs": [3]}).json()["model"] == "own"


def test_a_bare_route_that_two_models_share_is_decided_by_languages_or_refused(client: httpx.Client) -> None:
    assert client.post("/v1/translate", json={"text": "a", "target": "de"}).json()["model"] == "en-de"
    assert client.post("/v1/translate", json={"text": "a", "model": "en-fr"}).json()["model"] == "en-fr"
    refused = client.post("/v1/translate", json={"text": "a"})
    assert (refused.status_code, "en-fr (en to fr)" in refused.json()["error"]["hint"]) == (400, True)


def test_the_same_text_alone_and_in_a_list_has_the_same_answer(client: httpx.Client) -> None:
    texts = ["1 July", "a rather longer text of the 11 July", "7"]
    together = client.post("/v1/translate/en-fr", json={"text": texts}).json()["translations"]
    alone = [client.post("/v1/translate/en-fr", json={"text": text}).json()["translations"][0] for text in texts]
    assert together == alone


def test_a_translation_is_sent_while_it_grows(client: httpx.Client) -> None:
    text = "a rather longer text of the 11 July"
    (whole,) = client.post("/v1/translate/en-fr", json={"text": [text]}).json()["translations"]
    accept = {"accept": "text/event-stream"}
    with client.stream("POST", "/v1/translate/en-fr", json={"text": text}, headers=accept) as response:
        *partial, done = [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
    assert json.loads(done)["translations"] == [whole]
    assert partial and all(whole["text"].startswith(json.loads(each)["text"]) for each in partial)


def test_clients_of_other_services_and_people_are_answered_through_the_front(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    import deepl
    import tritonclient.http as triton
    from huggingface_hub import InferenceClient
    from libretranslatepy import LibreTranslateAPI

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    text = "a text of the 11 July"
    (expected,) = client.post("/v1/translate/en-de", json={"text": [text]}).json()["translations"]
    german = expected["text"]
    assert InferenceClient(model=f"{server.url}/models/en-de").translation(text).translation_text == german
    assert str(deepl.DeepLClient("any", server_url=server.url).translate_text(text, target_lang="DE")) == german
    assert LibreTranslateAPI(server.url).translate(text, "en", "de") == german
    sent = triton.InferInput("text", [1], "BYTES")
    sent.set_data_from_numpy(np.array([text.encode()], dtype=np.object_), binary_data=False)
    wanted = [triton.InferRequestedOutput("translation", binary_data=False)]
    with triton.InferenceServerClient(server.url.removeprefix("http://")) as inference:
        found = inference.infer("en-de", [sent], outputs=wanted).as_numpy("translation")
    assert [str(each) for each in found] == [german]
    many = client.post("/models/en-de", json={"inputs": [text] * 300})  # all replicas answer it together
    assert (many.status_code, many.headers["x-model-version"]) == (200, "en-de@r1-step-00000010")
    assert [each["translation_text"] for each in many.json()] == [german] * 300
    page = client.get("/", headers={"accept": "text/html"})
    assert page.headers["content-type"].startswith("text/html") and "en-de" not in page.text


def test_health_readiness_models_and_documents(client: httpx.Client) -> None:
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/readyz").json()["models"] == {"en-fr": "ready", "en-de": "ready", "own": "ready"}
    names = [model["ref"] for model in client.get("/v1/models").json()["models"]]
    assert names == ["en-fr@r1-step-00000010", "en-de@r1-step-00000010", "own@r1-step-00000010"]
    assert "/v1/predict/own" in client.get("/openapi.json").json()["paths"]
    assert "<h1>" in client.get("/docs").text


LINES = {"accept": "application/x-ndjson"}
JSON = {"content-type": "application/json"}
REFUSED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "malformed": ("POST", "/v1/predict", {"content": b"{", "headers": JSON}, 400),
    "NaN": ("POST", "/v1/predict", {"content": b'{"inputs": [NaN]}', "headers": JSON}, 400),
    "overflow": ("POST", "/v1/predict", {"content": b'{"inputs": [1e400]}', "headers": JSON}, 422),
    "lone surrogate": ("POST", "/v1/translate/en-fr", {"content": b'{"text": "\\ud800"}', "headers": JSON}, 400),
    "surrogate in a refused field": (
        "POST",
        "/v1/predict",
        {"content": b'{"x": "\\ud800"}', "headers": JSON},
        400,
    ),
    "deep": ("POST", "/v1/predict", {"content": b"[" * 50_000, "headers": JSON}, 400),
    "unknown key": ("POST", "/v1/predict", {"json": {"inputs": [1], "x": 1}}, 422),
    "empty list": ("POST", "/v1/predict", {"json": {"inputs": []}}, 422),
    "empty list at the edge": ("POST", "/v1/translate", {"json": {"text": [], "target": "fr"}}, 422),
    "wrong type": ("POST", "/v1/translate/en-fr", {"json": {"text": 3}}, 422),
    "long text": ("POST", "/v1/translate/en-fr", {"json": {"text": "a" * 501}}, 413),
    "large body": ("POST", "/v1/predict", {"content": b"1" * 150_000, "headers": JSON}, 413),
    "very large body": ("POST", "/v1/predict", {"content": b"1" * 20_000_000, "headers": JSON}, 413),
    "form": ("POST", "/v1/predict", {"data": {"inputs": "1"}}, 415),
    "method": ("GET", "/v1/predict", {}, 405),
    "method at the edge": ("DELETE", "/v1/models", {}, 405),
    "path": ("GET", "/v1/nothing", {}, 404),
    "model": ("POST", "/v1/translate/en-es", {"json": {"text": "a"}}, 404),
    "no such task": ("POST", "/v1/classify", {"json": {"text": "a"}}, 404),
    "hostile request id": ("GET", "/v1/predict", {"headers": {"x-request-id": b"\xff\xfe"}}, 405),
}


@pytest.mark.parametrize("method, path, arguments, status", REFUSED.values(), ids=REFUSED)
def test_wrong_input_is_refused_over_the_wire(
    client: httpx.Client, method: str, path: str, arguments: dict[str, Any], status: int
) -> None:
    response = client.request(method, path, **arguments)
    assert (response.status_code, len(response.content) < 2000) == (status, True)
    assert set(response.json()["error"]) == {"code", "message", "hint"}


def test_every_path_with_and_without_a_slash_answers_without_a_redirect(client: httpx.Client) -> None:
    for path in ("/v1/predict", "/v1/predict/", "/v1/predict/own", "/v1/predict/own/"):
        assert client.post(path, json={"inputs": [1]}).status_code == 200, path


def test_requests_in_parallel_share_runs_of_the_model(server: Running) -> None:
    num_requests = 64
    with httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(number: int) -> dict[str, Any]:
            found: dict[str, Any] = client.post("/v1/predict", json={"inputs": [number]}).json()["predictions"][0]
            return found

        with concurrent.futures.ThreadPoolExecutor(32) as pool:
            answers = list(pool.map(ask, range(num_requests)))
    assert [answer["value"] for answer in answers] == [float(number) for number in range(num_requests)]
    # An item that shared its run with n-1 others stands for 1/n of a run.
    num_runs = sum(1 / answer["batch"] for answer in answers)
    assert num_runs < num_requests / 2


def test_a_large_request_is_answered_by_all_replicas_together_and_in_order(client: httpx.Client) -> None:
    numbers = list(range(600))
    whole = client.post("/v1/predict", json={"inputs": numbers}).json()["predictions"]
    assert [each["value"] for each in whole] == numbers
    assert len({each["pid"] for each in whole}) == 2
    padded = [
        {"value": number, "padding": "x" * 120} for number in numbers
    ]  # too large to be sent twice by a front
    for inputs in (numbers, padded):
        with client.stream("POST", "/v1/predict/own", json={"inputs": inputs}, headers=LINES) as response:
            *lines, last = (json.loads(line) for line in response.iter_lines())
        assert [(each["index"], each["prediction"]["value"]) for each in lines] == [(n, n) for n in numbers]
        assert last == {"model": "own", "version": "r1-step-00000010", "count": 600}


def test_nothing_listens_beyond_loopback(server: Running) -> None:
    listening = [
        connection.laddr
        for process in family(server.pid)
        for connection in process.net_connections(kind="tcp")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) > 5
    assert [address for address in listening if address.ip not in ("127.0.0.1", "::1", "::ffff:127.0.0.1")] == []


def test_the_servers_folder_and_record_are_the_users_alone(server: Running) -> None:
    (record,) = json.loads(server.command.run("serve", "status", "--json").stdout)["servers"]
    assert (record["pid"], record["url"], record["state"]) == (server.pid, server.url, "ready")
    folder = Path(record["folder"])
    assert [path.stat().st_mode & 0o077 for path in (folder, folder / "token")] == [0, 0]


def test_a_replica_that_is_killed_under_load_loses_no_request(server: Running) -> None:
    if server.info["front"] != "haproxy":
        pytest.skip("the front of this platform does not send a request again")
    stop = threading.Event()
    statuses: list[int | str] = []
    pids: set[int] = set()

    def load() -> None:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            while not stop.is_set():
                try:
                    response = client.post("/v1/predict", json={"inputs": [1] * 20})
                    statuses.append(response.status_code)
                    pids.add(response.json()["predictions"][0]["pid"])
                except (httpx.HTTPError, ValueError, KeyError) as error:
                    statuses.append(repr(error))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        running = [pool.submit(load) for _ in range(4)]
        try:
            while len(pids) < 2 and len(statuses) < 2000:
                stop.wait(0.1)
            os.kill(sorted(pids)[0], signal.SIGKILL)
            killed_at = len(statuses)
            while len(statuses) < killed_at + 200:
                stop.wait(0.1)
        finally:
            stop.set()
        for each in running:
            each.result(60)
    assert set(statuses) == {200}, {status: statuses.count(status) for status in set(statuses)}
    assert wait_until(server.url + "/readyz").status_code == 200


def test_a_canary_answers_the_requests_of_its_ids_and_goes_back(server: Running, models: Path) -> None:
    commit(echo("own", SLEEP_S), models / "store", step=20)
    home = Home(server.command.home)
    (record,) = home.records()
    commander, ids = Commander(home, record), [f"request-{number}" for number in range(30)]
    canary = commander.canary("own", "@latest", 50)
    commander.wait("own", canary, divides_for(canary), 60)
    split = Split("r1-step-00000010", canary, 50)
    with httpx.Client(base_url=server.url, timeout=30) as client:

        def versions() -> list[str]:
            answers = [
                client.post("/v1/predict", json={"inputs": [1]}, headers={"x-request-id": id}) for id in ids
            ]
            return [answer.json()["version"] for answer in answers]

        expected = [split.choose(id) for id in ids]
        assert versions() == expected
        commander.roll_back("own")
        commander.wait("own", split.current, answers_alone(split.current), 60)
        assert set(versions()) == {split.current}
    assert commander.rollouts()["own"]["refused"]["reason"] == "rolled back"


def test_a_port_in_use_is_said_in_seconds_and_starts_nothing(server: Running, models: Path) -> None:
    port = server.url.rpartition(":")[2]
    done = server.command.run("serve", str(models / "en-fr.yaml"), "--port", port, "--json", timeout_s=60)
    assert done.returncode == 1
    assert f"port {port}" in json.loads(done.stdout)["error"]["message"]


HOSTILE_BYTES: dict[str, tuple[bytes, int]] = {
    "pipelined": (POST + b"content-length: 15\r\n\r\n" + b'{"inputs": [1]}' + GET + b"\r\n", 200),
    "chunked": (POST + b"transfer-encoding: chunked\r\n\r\nf\r\n" + b'{"inputs": [1]}' + b"\r\n0\r\n\r\n", 200),
    "no body": (POST + b"\r\n", 400),
    "two lengths": (POST + b"content-length: 3\r\ncontent-length: 4\r\n\r\nabc", 400),
    "a large header": (GET + b"x: " + b"a" * 17_000 + b"\r\n\r\n", 431),
    "a long URL": (b"GET /" + b"a" * 17_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", 414),
    "an unknown method": (b"BREW /v1/predict HTTP/1.1\r\nhost: x\r\n\r\n", 405),
    "an upgrade": (GET + b"connection: upgrade\r\nupgrade: h2c\r\n\r\n", 405),
    "an encoded NUL": (b"GET /v1/predict/%00 HTTP/1.1\r\nhost: x\r\n\r\n", 405),
    "the routes of Serve": (b"GET /-/routes HTTP/1.1\r\nhost: x\r\n\r\n", 404),
    "garbage": (b"\x16\x03\x01" * 20 + b"\r\n\r\n", 400),
}


@pytest.mark.parametrize("data, status", HOSTILE_BYTES.values(), ids=HOSTILE_BYTES)
def test_hostile_bytes_are_refused_and_hurt_nobody(
    server: Running, client: httpx.Client, data: bytes, status: int
) -> None:
    if server.info["front"] != "haproxy":
        pytest.skip("another front")
    with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port), timeout=10) as connection:
        connection.sendall(data)
        assert connection.recv(65536).startswith(b"HTTP/1.1 %d " % status)
    assert client.post("/v1/predict", json={"inputs": [1]}).status_code == 200


def test_an_answer_names_its_request_once_and_the_access_log_tells_of_it_without_its_text(
    server: Running, client: httpx.Client
) -> None:
    texts = {"text": ["6 July of a secret", "7 July"]}
    answers = {
        "direct": client.post("/v1/translate/en-fr", json=texts, headers={"x-request-id": "direct"}),
        "by-the-edge": client.post(
            "/v1/translate", json={**texts, "target": "de"}, headers={"x-request-id": "by-the-edge"}
        ),
        "refused": client.get("/v1/predict", headers={"x-request-id": "refused"}),
    }
    for id, answer in answers.items():
        assert answer.headers.get_list("x-request-id") == [id]
    made = client.get("/healthz").headers.get_list("x-request-id")
    assert len(made) == 1 and len(made[0]) >= 32
    lines = _lines_of(Path(server.info["access_log"]), set(answers))
    assert {id: (line["status"], line["model"], line["items"]) for id, line in lines.items()} == {
        "direct": (200, "en-fr", 2),
        "by-the-edge": (200, "en-de", 2),
        "refused": (405, None, 0),
    }
    assert lines["direct"]["route"] == "/v1/translate/{model}" and lines["direct"]["tokens"] > 2
    assert lines["direct"]["version"] == "r1-step-00000010" and lines["direct"]["ms"] > 0
    assert "secret" not in Path(server.info["access_log"]).read_text()


def test_the_metrics_of_all_replicas_are_at_the_edge(server: Running, client: httpx.Client) -> None:
    def ask(_: int) -> int:
        return httpx.post(server.url + "/v1/predict", json={"inputs": [1, 2, 3]}, timeout=30).status_code

    deadline = time.monotonic() + 30
    while True:
        # Again and again: the replica in the place of one that was killed counts from its first request on.
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(16))) == {200}
        response = client.get("/metrics")
        families = {each.name: each for each in text_string_to_metric_families(response.text)}
        items = families["eagleray_items"].samples if "eagleray_items" in families else []
        replicas = {sample.labels["replica"] for sample in items if sample.labels["model"] == "own"}
        if len(replicas) >= 2 or time.monotonic() > deadline:
            break
        time.sleep(0.2)
    assert len(replicas) >= 2
    for name in ("requests", "request_seconds", "tokens", "answer_seconds", "batch_items", "queued_tokens"):
        assert families[f"eagleray_{name}"].samples, name
    (sample, *_) = items
    assert {"model", "version", "lane", "replica"} == set(sample.labels)


def test_the_list_of_models_tells_limits_and_scores(client: httpx.Client) -> None:
    models = {model["name"]: model for model in client.get("/v1/models").json()["models"]}
    assert models["own"]["limits"]["max_body_bytes"] == 100_000
    assert models["en-fr"]["scores"] == {"loss": 1.0}


def _lines_of(log: Path, ids: set[str]) -> dict[str, Any]:
    deadline = time.monotonic() + 10
    while True:
        found = {line["id"]: line for line in map(json.loads, log.read_text().splitlines()) if line["id"] in ids}
        if set(found) == ids or time.monotonic() > deadline:
            return found
        time.sleep(0.1)
