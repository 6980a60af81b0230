"""A replica whose model lies on two workers answers like one worker, and loses nothing with a rank."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from serving_models import Command, commit, family, translation, wait_gone, write_file

TEXTS = [f"{day} July, a text of the {day * 3}" for day in range(1, 20)]
WORKER: dict[str, Any] = {"ray_actor_options": {"num_cpus": 0.25}}


@dataclass
class Load:
    """Clients that ask all the time, one after the other each; keeps every answer."""

    url: str
    expected: dict[str, str]
    answers: list[tuple[float, int, bool]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def __enter__(self) -> Load:
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(4)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(60)

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self.url, timeout=60) as client:
            while not self._stop.is_set():
                text = TEXTS[number % len(TEXTS)]
                number += 1
                try:
                    answer = client.post("/v1/translate/pair", json={"text": text})
                except httpx.HTTPError as error:
                    self.errors.append(repr(error))
                    continue
                is_right = answer.status_code == 200 and _texts(answer) == [self.expected[text]]
                self.answers.append((time.monotonic(), answer.status_code, is_right))


def _texts(answer: httpx.Response) -> list[str]:
    return [each["text"] for each in answer.json()["translations"]]


@dataclass(frozen=True)
class Running:
    url: str
    process: subprocess.Popen[str]
    command: Command

    @property
    def pid(self) -> int:
        return self.process.pid

    def processes(self, name: str) -> dict[int, psutil.Process]:
        """Processes of the server whose title begins with a name."""
        found = {}
        for process in family(self.pid):
            try:
                if process.cmdline()[:1] and process.cmdline()[0].startswith(name):
                    found[process.pid] = process
            except psutil.Error:
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        return self.processes("ray::RankActor")

    def wait_for_ranks(self, number: int, timeout_s: float = 90) -> set[int]:
        deadline = time.monotonic() + timeout_s
        while len(self.ranks()) != number and time.monotonic() < deadline:
            time.sleep(0.2)
        return set(self.ranks())


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model on one worker, and the same one on two times two."""
    folder = tmp_path_factory.mktemp("groups")
    yield from _serve(folder, [
        translation("alone", ray_actor_options=WORKER["ray_actor_options"]),
        translation("pair", tensor_parallel_degree=2, num_replicas=2, **WORKER),
    ])  # fmt: skip


def _serve(folder: Path, files: list[dict[str, Any]]) -> Iterator[Running]:
    for file in files:
        commit(file, folder / "store")
        write_file({**file, "store": str(folder / "store")}, folder)
    command = Command(folder / "home")
    process, info = command.serve(*(str(folder / f"{file['name']}.yaml") for file in files))
    everything = family(process.pid)
    yield Running(info["url"], process, command)
    if process.poll() is not None:  # a test has killed it
        return
    everything = list({each.pid: each for each in [*everything, *family(process.pid)]}.values())
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert wait_gone(everything) == []
    assert process.stdout is not None
    process.stdout.close()


@pytest.fixture(scope="module")
def expected(server: Running) -> dict[str, str]:
    answer = httpx.post(f"{server.url}/v1/translate/alone", json={"text": TEXTS}, timeout=60)
    return dict(zip(TEXTS, _texts(answer), strict=True))


def test_it_answers_like_one_worker(server: Running, expected: dict[str, str]) -> None:
    assert len(server.ranks()) == 4
    for _ in range(4):  # both replicas
        answer = httpx.post(f"{server.url}/v1/translate/pair", json={"text": TEXTS}, timeout=60)
        assert _texts(answer) == list(expected.values())


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_costs_no_request_and_a_new_group_comes_up(
    server: Running, expected: dict[str, str], sent: signal.Signals
) -> None:
    before = server.wait_for_ranks(4)
    assert len(before) == 4
    with Load(server.url, expected) as load:
        time.sleep(1)
        lost_at = time.monotonic()
        os.kill(min(before), sent)
        gone_at, back_at = _until_replaced(server, before, lost_at)
        time.sleep(1)
    assert load.errors == []
    assert all(status == 200 and is_right for _, status, is_right in load.answers)
    # Within ten seconds the replica is out of rotation, and its other rank is gone with it.
    assert gone_at - lost_at < 10
    assert back_at > gone_at
    meanwhile = [at for at, _, _ in load.answers if gone_at < at < back_at]
    assert meanwhile, "the other replica answers until the new one is there"


def _until_replaced(server: Running, before: set[int], lost_at: float) -> tuple[float, float]:
    """Wait until two of the ranks are gone and two others are there."""
    gone_at = None
    while time.monotonic() < lost_at + 120:
        now = set(server.ranks())
        if gone_at is None and len(before & now) <= 2:
            gone_at = time.monotonic()
        if gone_at is not None and len(now) == 4:
            return gone_at, time.monotonic()
        time.sleep(0.1)
    raise AssertionError(f"of {before} there are {now}; gone after {gone_at and gone_at - lost_at}")


def test_ranks_do_not_outlive_their_replica(server: Running, expected: dict[str, str]) -> None:
    before = server.wait_for_ranks(4)
    replicas = server.processes("ray::ServeReplica:model-pair")
    with Load(server.url, expected) as load:
        lost_at = time.monotonic()
        os.kill(min(replicas), signal.SIGKILL)
        gone_at, _ = _until_replaced(server, before, lost_at)
    assert gone_at - lost_at < 10
    assert load.errors == []
    assert all(status == 200 and is_right for _, status, is_right in load.answers)


def test_a_killed_server_leaves_neither_process_nor_record_and_its_port_is_free(server: Running) -> None:
    """The last test of this server."""
    everything = family(server.pid)
    server.process.kill()
    server.process.wait(30)
    assert server.process.stdout is not None
    server.process.stdout.close()
    assert wait_gone(everything, 60) == []
    # The next call of any verb clears the records and folders of the dead away.
    assert json.loads(server.command.run("serve", "status", "--json").stdout) == {"servers": []}
    with socket.create_server(("127.0.0.1", httpx.URL(server.url).port or 0)):
        pass  # nobody listens there any more, and the next server can


@pytest.mark.slow
def test_stages_answer_like_one_worker_and_are_swapped_for_a_new_version(tmp_path: Path) -> None:
    pair = translation("pair", pipeline_parallel_degree=2, follow="latest", follow_interval_s=0.5, **WORKER)
    files = [translation("alone", ray_actor_options=WORKER["ray_actor_options"]), pair]
    for running in _serve(tmp_path, files):
        answers = [
            httpx.post(f"{running.url}/v1/translate/{name}", json={"text": TEXTS, "num_beams": 3}, timeout=60)
            for name in ("alone", "pair")
        ]
        assert _texts(answers[0]) == _texts(answers[1])
        before = set(running.ranks())
        assert len(before) == 2
        commit(pair, tmp_path / "store", step=20)
        deadline, versions = time.monotonic() + 120, set[str]()
        while "r1-step-00000020" not in versions and time.monotonic() < deadline:
            answer = httpx.post(f"{running.url}/v1/translate/pair", json={"text": TEXTS[:3]}, timeout=60)
            assert answer.status_code == 200
            versions.add(answer.json()["version"])
            time.sleep(0.2)
        assert versions == {"r1-step-00000010", "r1-step-00000020"}
        while before & set(running.ranks()) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert len(running.ranks()) == 2 and not before & set(running.ranks())
