"""Starts a server, keeps it, and ends it: a head of our own, or applications on a cluster that runs already."""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from eagleray.cluster import check_local, connect
from eagleray.config.loader import LoadedFile
from eagleray.errors import ConfigError, EaglerayError, ServingError, UsageError
from eagleray.resources import ResourceRequest
from eagleray_serving.autoscaling import initial_replicas, num_ranks
from eagleray_serving.front import LOOPBACK, Front, RequestLimits, choose_front, joined_environment
from eagleray_serving.home import Home, ServerRecord, own_record
from eagleray_serving.plan import EDGE_APPLICATION, ModelPlan, prefixes
from eagleray_serving.protection import (
    KEYS_VARIABLE,
    Certificate,
    EdgeOptions,
    Protection,
    is_loopback,
    trusting,
)
from eagleray_serving.watchdog import watched

Notify = Callable[[str], None]
READY_TIMEOUT_S = 600.0
WATCH_S = 1.0
DRAIN_TIMEOUT_S = 30.0
REPEAT_S = 1.0


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """What the command line says about a server.

    Attributes:
        host: Address to listen on.
        port: Port to listen on; 0: any free one.
        address: Cluster to serve on; None: a head of our own.
        verbose: Leave Ray's log lines on the terminal.
        id: Name of its record.
        log: Where a detached server's output goes.
        ready_timeout_s: Seconds in which every replica must answer.
        edge: Keys, TLS and the access log.
    """

    host: str
    port: int
    address: str | None
    verbose: bool
    id: str
    log: str | None = None
    ready_timeout_s: float = READY_TIMEOUT_S
    edge: EdgeOptions = field(default_factory=EdgeOptions)


@dataclass(frozen=True, slots=True)
class Served:
    """A server that answers.

    Attributes:
        record: What is remembered of it.
        front: `haproxy`, `python`, or `existing` on a cluster where Serve ran already.
        plans: Its models.
        edge: Its keys, TLS and access log.
    """

    record: ServerRecord
    front: str
    plans: tuple[ModelPlan, ...]
    edge: EdgeOptions = field(default_factory=EdgeOptions)

    def as_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        return {
            "id": self.record.id,
            "url": self.record.url,
            "pid": self.record.pid,
            "front": self.front,
            "log": self.record.log,
            "access_log": self.plans[0].protection.access_log,
            "has_keys": self.edge.has_keys,
            "models": [plan.card.as_json() for plan in self.plans],
        }

    def curl(self) -> str:
        """Return a command line that works."""
        bare = prefixes(self.plans)
        card = self.plans[0].card
        url = self.record.url + bare[card.name]
        if card.inputs == "images":
            data = """'{"images": ["'"$(base64 < image.png | tr -d '\\n')"'"]}'"""
        elif card.inputs == "text":
            data = """'{"text": "6 July 2011"}'"""
        else:
            columns = ", ".join(f'"{column}": "..."' for column in self.plans[0].columns)
            data = f"""'{{"inputs": [{{{columns}}}]}}'"""
        trust = "" if self.edge.certificate is None else f" --cacert {self.edge.certificate.chain}"
        key = ' -H "authorization: Bearer $EAGLERAY_KEY"' if self.edge.has_keys else ""
        return f"curl -s{trust} {url}{key} -H 'content-type: application/json' -d {data}"


class StopRequest:
    """Turns SIGINT and SIGTERM into a request to stop: an exception while starting, a flag afterwards.

    A second one, a second later, has its usual meaning: this process ends at once, and what it started with it.
    """

    def __init__(self) -> None:
        self._event = threading.Event()
        self._starting = True
        self._asked_at: float | None = None

    def install(self) -> None:
        """Take the signals, also from Ray, which installs handlers of its own."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, _: object) -> None:
        now = time.monotonic()
        if self._asked_at is not None:
            # Not at once: `timeout` and some supervisors signal the process and then its whole group.
            if now - self._asked_at >= REPEAT_S:
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            return
        self._asked_at = now
        self._event.set()
        if self._starting:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    def wait(self, is_alive: Callable[[], bool]) -> None:
        """Return when a signal came.

        Raises:
            ServingError: The server died first.
        """
        self._starting = False
        while not self._event.wait(WATCH_S):
            if not is_alive():
                raise ServingError("Ray ended under the server", "its log has the reason; start it again")


def access_log_path(home: Home, id: str) -> Path:
    """Return where the access log of a server is written unless another place is named."""
    return home.log_path(f"{id}-access")


def require_resources(plans: Sequence[ModelPlan]) -> None:
    """Compare what the replicas ask for with this machine, before Ray is started.

    Raises:
        ResourceError: There is less, with the numbers.
    """
    counts = [initial_replicas(plan.serve) * num_ranks(plan.serve) for plan in plans]
    total, noun = (
        sum(counts),
        "workers of replicas" if any(num_ranks(plan.serve) > 1 for plan in plans) else "replicas",
    )
    wanted = {"CPU": 0.0, "GPU": 0.0}
    for plan, count in zip(plans, counts, strict=True):
        options = plan.serve.ray_actor_options
        wanted["CPU"] += options.num_cpus * count
        wanted["GPU"] += options.num_gpus * count
    if total:
        bundle = {name: amount / total for name, amount in wanted.items() if amount}
        check_local(ResourceRequest(total, bundle, noun, "serve.ray_actor_options"))


def refuse_relative_stores(files: Sequence[LoadedFile]) -> None:
    """Refuse a store that means another place on each machine of a cluster.

    Raises:
        ConfigError: A store is a relative path.
    """
    for file in files:
        store = file.config.store or ""
        if "://" not in store and not Path(store).is_absolute():
            raise ConfigError(
                f"{file.path}: the store {store!r} is relative, and the replicas run elsewhere",
                "name an absolute path that every node shares, or a bucket: --store s3://bucket/prefix",
            )


def serve_here(
    plans: Sequence[ModelPlan], options: ServerOptions, home: Home, on_ready: Callable[[Served], None]
) -> None:
    """Serve on a head of our own until SIGINT or SIGTERM.

    Raises:
        ServingError: A port is in use, a replica does not start, or Ray died.
        ResourceError: This machine has less than the replicas ask for.
    """
    from eagleray_serving.head import own_head, ray_is_alive

    require_resources(plans)
    front = choose_front(options.host, options.port, options.edge.certificate)
    # What is hashed in the server's folder by now is not for the environment of all its processes.
    os.environ.pop(KEYS_VARIABLE, None)
    stop = StopRequest()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="eagleray-", dir="/tmp")))
        plans = _protected(plans, options.edge.protection(access_log_path(home, options.id), folder))
        record = own_record(
            options.id, folder, front.url, _applications(plans), [plan.card.ref for plan in plans], options.log
        )
        if front.certificate is not None:
            record = replace(record, certificate=str(front.certificate.chain))
        home.write(record)
        stack.callback(home.remove, record)
        stack.enter_context(watched(folder))
        stop.install()
        with _recorded_failure(home, record, stack):
            limits = RequestLimits.of(plan.serve for plan in plans)
            stack.enter_context(
                own_head(front, folder, limits, home.log_path(f"{options.id}-ray"), options.verbose)
            )
            stop.install()
            _deploy(plans, front, options.ready_timeout_s, home.new_token_sha256(options.id))
            stack.callback(_drain, record.applications)
            record = home.update(record, "ready")
        on_ready(Served(record, front.kind, tuple(plans), options.edge))
        stop.wait(ray_is_alive)
        home.update(record, "stopping")


@contextmanager
def _recorded_failure(home: Home, record: ServerRecord, stack: ExitStack) -> Iterator[None]:
    """Leave word of a failed start for whoever waits for a detached server."""
    try:
        yield
    except EaglerayError as error:
        if record.log is not None:
            failed = {
                "code": error.code,
                "message": error.message,
                "hint": error.hint,
                "exit_code": error.exit_code,
            }
            stack.callback(home.update, replace(record, folder=None), "failed", failed)
        raise


def serve_there(
    plans: Sequence[ModelPlan],
    options: ServerOptions,
    home: Home,
    on_ready: Callable[[Served], None],
    *,
    detach: bool = False,
) -> None:
    """Serve on a cluster that runs already, until SIGINT or SIGTERM, or for good with `detach`.

    Raises:
        ServingError: An application of this name is there already, or a replica does not start.
    """
    from eagleray_serving.launch import (
        current_runtime_env,
        delete,
        launch,
        refuse_existing,
        running_host,
        running_url,
        start_serve,
    )

    stop = StopRequest()
    plans = _protected(plans, options.edge.protection(None))
    applications = _applications(plans)
    code = [path for plan in plans for path in plan.code]
    with ExitStack() as stack:
        cluster = stack.enter_context(connect(options.address, code=code, verbose=options.verbose))
        stop.install()
        url, front = running_url(), "existing"
        if url is not None and not options.edge.has_keys and not options.edge.is_insecure:
            _refuse_open_front(running_host())
        if url is None:
            variables = joined_environment()
            start_serve(options.host, options.port, variables)
            url = f"http://{options.host}:{options.port}"
            front = "haproxy" if "RAY_SERVE_ENABLE_HA_PROXY" in variables else "python"
        for abandoned in home.records():
            if abandoned.state == "abandoned" and abandoned.address == cluster.address:
                delete(abandoned.applications)
                home.remove(abandoned)
        refuse_existing(applications)
        refs = [plan.card.ref for plan in plans]
        record = own_record(options.id, None, url, applications, refs, None, cluster.address)
        home.write(record)
        kept = stack.enter_context(ExitStack())
        kept.callback(home.remove, record)
        kept.callback(delete, applications)
        launch(plans, current_runtime_env(), home.new_token_sha256(options.id))
        _wait(plans, url, options.ready_timeout_s)
        record = home.update(replace(record, pid=None, created=None) if detach else record, "ready")
        on_ready(Served(record, front, tuple(plans), options.edge))
        if detach:
            kept.pop_all()
            return
        stop.wait(lambda: True)


def stop_there(record: ServerRecord, *, verbose: bool = False) -> None:
    """Take the applications of a server without a process off the cluster that they are on."""
    from eagleray_serving.launch import delete

    with connect(record.address, verbose=verbose):
        delete(record.applications)


def _deploy(plans: Sequence[ModelPlan], front: Front, ready_timeout_s: float, token_sha256: str) -> None:
    from eagleray_serving.launch import launch, start_serve

    # HAProxy listens on the network and ends TLS by itself; told of it, Serve's replicas would do both as well.
    host, certificate = (front.host, front.certificate) if front.binary is None else (LOOPBACK, None)
    start_serve(host, front.ports.http, {}, certificate)
    launch(plans, None, token_sha256)
    _wait(plans, front.url, ready_timeout_s, front.certificate)


def _protected(plans: Sequence[ModelPlan], protection: Protection) -> list[ModelPlan]:
    return [replace(plan, protection=protection) for plan in plans]


def _refuse_open_front(host: str) -> None:
    if not is_loopback(host):
        raise UsageError(
            f"Serve on this cluster listens on {host}, and the server has no keys",
            "make one: eagleray keys add NAME; or say that everybody may use it: --insecure-no-keys",
        )


def _wait(
    plans: Sequence[ModelPlan], url: str, ready_timeout_s: float, certificate: Certificate | None = None
) -> None:
    from eagleray_serving.launch import wait_until_ready

    awaited = [plan.card.path for plan in plans if initial_replicas(plan.serve) > 0]
    trust = trusting(None if certificate is None else certificate.chain)
    wait_until_ready(_applications(plans), url, awaited, ready_timeout_s, trust)


def _applications(plans: Sequence[ModelPlan]) -> list[str]:
    return [*(plan.application for plan in plans), EDGE_APPLICATION]


def _drain(applications: Sequence[str]) -> None:
    from eagleray_serving.launch import delete

    # The head ends in any case; not by `serve.shutdown`, whose controller is killed over its own last words.
    with suppress(Exception):
        delete(applications, DRAIN_TIMEOUT_S)
