"""Clients of a server under load, and the processes that are killed meanwhile."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil
from serving_models import Command, commit, family, wait_gone, write_file

REPLICA = "ServeReplica:model-"


def model_replicas(server_pid: int) -> list[psutil.Process]:
    """The processes of model replicas below a server, the oldest first; not that of the edge."""
    found = []
    for process in family(server_pid):
        try:
            if any(REPLICA in word for word in process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return sorted(found, key=lambda process: process.create_time())


def wait_replicas(server_pid: int, count: int, timeout_s: float = 180) -> list[psutil.Process]:
    """Wait until so many replicas have a process."""
    deadline = time.monotonic() + timeout_s
    while len(found := model_replicas(server_pid)) < count:
        assert time.monotonic() < deadline, f"{len(found)} of {count} replicas"
        time.sleep(0.1)
    return found


def kill_each_replica(server_pid: int, pause_s: float) -> list[int]:
    """Kill every replica that is there now, one after the other, each once the others are back."""
    killed = []
    first = model_replicas(server_pid)
    for process in first:
        os.kill(process.pid, signal.SIGKILL)
        killed.append(process.pid)
        time.sleep(pause_s)
        wait_replicas(server_pid, len(first))
    return killed


def post_in_two(url: str, body: bytes, timeout_s: float = 60) -> tuple[int, bytes]:
    """Send head and body apart, as some clients do; return status and body."""
    parts = urlsplit(url)
    with socket.create_connection((parts.hostname or "", parts.port or 80), timeout=timeout_s) as connection:
        head = (
            f"POST {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        connection.sendall(head.encode())
        time.sleep(0.01)
        connection.sendall(body)
        received = bytearray()
        while piece := connection.recv(65536):
            received += piece
    answer_head, _, answer = bytes(received).partition(b"\r\n\r\n")
    return int(answer_head.split(b" ", 2)[1]), answer


class Server:
    """`eagleray serve` of some files, until it is stopped."""

    def __init__(self, folder: Path, *files: dict[str, Any]) -> None:
        for file in files:
            commit(file, folder / "store")
            write_file({**file, "store": str(folder / "store")}, folder)
        self.command = Command(folder / "home")
        self.process, info = self.command.serve(*(str(folder / f"{file['name']}.yaml") for file in files))
        self.url: str = info["url"]
        self.front: str = info["front"]
        self.pid = self.process.pid

    def stop(self) -> list[str]:
        everything = family(self.pid)
        self.process.send_signal(signal.SIGINT)
        try:
            assert self.process.wait(90) == 0
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        assert self.process.stdout is not None
        self.process.stdout.close()
        return wait_gone(everything)


@dataclass
class History:
    """Every request by its id, with what came back."""

    outcomes: dict[int, str] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def record(self, number: int, outcome: str) -> None:
        with self.lock:
            assert number not in self.outcomes, f"{number} was answered twice"
            self.outcomes[number] = outcome

    def failures(self) -> dict[int, str]:
        return {number: outcome for number, outcome in self.outcomes.items() if outcome != "right"}


def wait_ready(url: str, timeout_s: float = 60) -> None:
    """Wait until every model answers."""
    deadline = time.monotonic() + timeout_s
    while httpx.get(url + "/readyz", timeout=30).status_code != 200:
        assert time.monotonic() < deadline, "not ready"
        time.sleep(0.2)
