"""The real HAProxy, edited by our launcher as a server's is, before an application in a thread: no Ray."""

from __future__ import annotations

import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn
from starlette.types import ASGIApp

from eagleray_serving.front import find_haproxy, install_launcher
from eagleray_serving.haproxy_launcher import Settings

# What Serve's template comes to, in short; that it is still of this form is tested beside the cluster.
WRITTEN = """global
    maxconn 1000
    tune.bufsize 262144
defaults
    mode http
    timeout connect 5s
    timeout client 30s
    timeout server 30s
    option abortonclose
frontend prometheus
    bind :{metrics}
frontend http_frontend
    bind 127.0.0.1:{port}
    default_backend application
backend application
    server a 127.0.0.1:{application}
listen stats
  bind *:{stats}
"""


@dataclass(frozen=True)
class RealFront:
    port: int
    application_port: int


def free_ports(number: int) -> list[int]:
    sockets = [socket.socket() for _ in range(number)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


@contextmanager
def application(app: ASGIApp, port: int) -> Iterator[None]:
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        _await(port)
        yield
    finally:
        server.should_exit = True
        thread.join(10)


@contextmanager
def real_front(app: ASGIApp, folder: Path, **settings: object) -> Iterator[RealFront]:
    """Start both; skips where there is no HAProxy."""
    binary = find_haproxy()
    if binary is None:
        pytest.skip("no HAProxy for this platform")
    metrics, port, inner, stats = free_ports(4)
    config = folder / "haproxy.cfg"
    config.write_text(WRITTEN.format(metrics=metrics, port=port, application=inner, stats=stats))
    chosen = {"request_timeout_s": 2, "max_header_bytes": 4096, "bulk_timeout_s": 4, **settings}
    launcher = install_launcher(Settings(str(binary), str(folder), **chosen))  # type: ignore[arg-type]
    with application(app, inner), (folder / "haproxy.log").open("w") as log:
        front = subprocess.Popen([launcher, "-db", "-f", config], stdout=log, stderr=log)
        try:
            _await(port)
            yield RealFront(port, inner)
        finally:
            front.terminate()
            front.wait(10)


def exchange(port: int, *pieces: bytes, wait_s: float = 4.0) -> bytes:
    """Send bytes as they are, and return what comes back until the other side closes or is silent."""
    with socket.create_connection(("127.0.0.1", port), timeout=wait_s) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(0.02)
            while received := connection.recv(65536):
                answer += received
                connection.settimeout(0.3)  # what follows an answer follows at once
        except TimeoutError:
            pass
        except ConnectionError:
            answer = answer or b"closed"
        return answer


def _await(port: int) -> None:
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
    raise TimeoutError(f"nothing listens on {port}")
