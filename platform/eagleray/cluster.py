"""Connect to Ray: join a running cluster, or start a local one and stop it again.

Ray itself waits forever for resources that do not exist, so what a run asks for is compared with what there is
before anything waits: locally before Ray is even started.
"""

from __future__ import annotations

import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eagleray.errors import EaglerayError, ResourceError, UsageError
from eagleray.local_ray import start_local_ray, stop_log_monitor
from eagleray.resources import ResourceRequest, Shortage, count_cpus, count_gpus, find_shortage
from eagleray.shipping import runtime_env
from eagleray.telemetry import RayLog

NAMESPACE = "eagleray"
AUTOSCALER_WAIT_S = 600.0
PROBE_TIMEOUT_S = 5.0
RELEASE_S = 15.0
"""Resources of a run that has just ended come back within this time."""

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Cluster:
    """A connection to Ray.

    Attributes:
        address: Address that other processes can join.
        is_local: Started by us, and stopped at the end.
        log_dir: Where Ray's own logs of this node are.
        ray_log: Ray's log lines of this process; None when they go to the terminal.
    """

    address: str
    is_local: bool
    log_dir: Path
    ray_log: RayLog | None = None

    @property
    def where(self) -> str:
        """What the cluster is called in a message."""
        return "this machine" if self.is_local else f"the cluster at {self.address}"

    def quiet(self) -> None:
        """Keep Ray off the terminal after a Ray library was imported that brought its own log handlers."""
        if self.ray_log is not None:
            self.ray_log.divert()

    def nodes(self) -> list[dict[str, float]]:
        """Return the resources of each live node, in use or not."""
        import ray

        return [node["Resources"] for node in ray.nodes() if node["Alive"]]

    def node_id(self) -> str:
        """Return the id of the node that this process runs on."""
        import ray

        return str(ray.get_runtime_context().get_node_id())

    def require(
        self, request: ResourceRequest, wait_s: float | None = None, notify: Notify = lambda _: None
    ) -> None:
        """Return once `request` can be placed.

        Args:
            request: What is asked for.
            wait_s: Seconds to wait for nodes that are missing; None: 600 where an autoscaler runs, else 0.
            notify: Told once what is missing, when there is a wait.

        Raises:
            ResourceError: It is still missing, with the numbers.
        """
        if self.is_local:
            wait_s = 0.0
        elif wait_s is None:
            wait_s = AUTOSCALER_WAIT_S if self.has_autoscaler() else 0.0
        self._await_nodes(request, wait_s, notify)
        self._await_release(request, max(wait_s, RELEASE_S), notify)

    def has_autoscaler(self) -> bool:
        """Whether nodes are added on demand: the cluster launcher and KubeRay both label their nodes."""
        import ray

        return any("ray.io/node-group" in node.get("Labels", {}) for node in ray.nodes() if node["Alive"])

    def _await_nodes(self, request: ResourceRequest, wait_s: float, notify: Notify) -> None:
        shortage = find_shortage(request, self.nodes(), self.where)
        if shortage is None:
            return
        if wait_s == 0:
            raise ResourceError(shortage.message, shortage.hint)
        notify(f"{shortage.message}; waiting up to {wait_s:g} s")
        with _asking_autoscaler(request):
            last = _poll(lambda: find_shortage(request, self.nodes(), self.where), wait_s)
        if last is not None:
            raise ResourceError(f"{last.message}, after a wait of {wait_s:g} s", last.hint)

    def _await_release(self, request: ResourceRequest, wait_s: float, notify: Notify) -> None:
        shortage = self._in_use(request)
        if shortage is None:
            return
        notify(f"{shortage.message}; waiting up to {wait_s:g} s")
        last = _poll(lambda: self._in_use(request), wait_s)
        if last is not None:
            raise ResourceError(f"{last.message}, after a wait of {wait_s:g} s", last.hint)

    def _in_use(self, request: ResourceRequest) -> Shortage | None:
        import ray

        free = ray.available_resources()
        for name, asked in request.total().items():
            if asked > free.get(name, 0.0) + 1e-9:
                return Shortage(
                    f"{request.num_bundles} {request.noun} ask for {name} {asked:g}, but of {self.where} only "
                    f"{name} {free.get(name, 0.0):g} is free",
                    "Wait until other work has ended, set resources.wait_s, or ask for less.",
                )
        return None


def _poll(find: Callable[[], Shortage | None], wait_s: float, interval_s: float = 0.5) -> Shortage | None:
    deadline = time.monotonic() + wait_s
    while (shortage := find()) is not None and time.monotonic() < deadline:
        time.sleep(interval_s)
    return shortage


@contextmanager
def _asking_autoscaler(request: ResourceRequest) -> Iterator[None]:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=[dict(request.bundle)] * request.num_bundles)
    try:
        yield
    finally:
        request_resources(bundles=[])


def check_local(request: ResourceRequest) -> None:
    """Compare a request with this machine, before Ray is started.

    Raises:
        ResourceError: This machine does not have what is asked for, with the numbers.
    """
    machine = {"CPU": float(count_cpus())}
    if (shortage := find_shortage(_only(request, "CPU"), [machine], "this machine")) is None:
        machine["GPU"] = float(count_gpus()) if request.bundle.get("GPU") else 0.0
        shortage = find_shortage(_only(request, "CPU", "GPU"), [machine], "this machine")
    if shortage is not None:
        raise ResourceError(shortage.message, shortage.hint)


def _only(request: ResourceRequest, *names: str) -> ResourceRequest:
    bundle = {name: amount for name, amount in request.bundle.items() if name in names}
    return ResourceRequest(request.num_bundles, bundle, request.noun, request.setting)


def find_address(address: str | None) -> str | None:
    """Return the cluster to join: `address`, else RAY_ADDRESS, else None for a local Ray.

    Raises:
        UsageError: A `ray://` address, over which a run cannot be driven.
    """
    target = address or os.environ.get("RAY_ADDRESS") or "local"
    if target.startswith("ray://"):
        raise UsageError(
            f"cannot drive a run through Ray Client ({target})",
            "Submit it instead (eagleray jobs submit), or run on a node of the cluster with address host:6379.",
        )
    return None if target == "local" else target


@contextmanager
def connect(
    address: str | None = None,
    *,
    request: ResourceRequest | None = None,
    code: Sequence[str] = (),
    wait_s: float | None = None,
    verbose: bool = False,
    dashboard: bool = False,
    notify: Notify = lambda _: None,
) -> Iterator[Cluster]:
    """Join a cluster, or start a local Ray that ends with the context.

    Args:
        address: Cluster to join; None: RAY_ADDRESS, else a local Ray.
        request: What will be asked for; checked before anything waits, locally before Ray is started.
        code: The user's `code:` directories, which travel to a joined cluster.
        wait_s: Seconds to wait for missing resources on a joined cluster; see `Cluster.require`.
        verbose: Leave Ray's own log lines on the terminal.
        dashboard: Start the dashboard (and with it the Jobs API) of a local Ray.
        notify: Told what is waited for.

    Raises:
        ResourceError: More is asked for than there is.
        UsageError: The address does not answer.
    """
    target = find_address(address)
    if target is not None:
        probe(target)
    elif request is not None:
        check_local(request)
    import ray

    if ray.is_initialized():  # a process that is connected already keeps its connection
        cluster = Cluster(ray.get_runtime_context().gcs_address, False, _log_dir())
        if request is not None:
            cluster.require(request, wait_s, notify)
        yield cluster
        return
    with ExitStack() as stack:
        ray_log = None if verbose else stack.enter_context(_ray_log())
        before = signal.getsignal(signal.SIGTERM)
        stack.callback(_give_sigterm_back, before)
        stack.callback(ray.shutdown)
        _init(target, code, verbose, dashboard, ray_log)
        _take_sigterm(before)
        cluster = Cluster(ray.get_runtime_context().gcs_address, target is None, _log_dir(), ray_log)
        if request is not None:
            cluster.require(request, wait_s, notify)
        yield cluster


def _init(target: str | None, code: Sequence[str], verbose: bool, dashboard: bool, log: RayLog | None) -> None:
    import ray

    quiet: dict[str, Any] = {"log_to_driver": verbose, "namespace": NAMESPACE}
    try:
        if target is None:
            start_local_ray(ray.init, num_cpus=count_cpus(), include_dashboard=dashboard, **quiet)
            if not verbose:
                stop_log_monitor()
        else:
            with tempfile.TemporaryDirectory(prefix="eagleray-ship-") as staging:
                ray.init(address=target, runtime_env=_environment(Path(staging), code), **quiet)
    except EaglerayError:
        raise
    except SystemExit as error:  # Ray's own handler of SIGTERM, which is in place meanwhile, exits with 15
        raise SystemExit(128 + signal.SIGTERM) from error
    except Exception as error:
        raise _explain(error, target, log) from error
    if log is not None:
        log.divert()


def _environment(staging: Path, code: Sequence[str]) -> dict[str, Any] | None:
    """Return what to ship to a joined cluster: inside a Ray job nothing, since the job came with it."""
    return None if "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ else runtime_env(staging, code)


def probe(target: str) -> None:
    """Fail within seconds where nothing listens: Ray itself tries for minutes.

    Args:
        target: What `find_address` returned.

    Raises:
        UsageError: It is no address, or nothing answers there.
    """
    if target == "auto":
        return  # Ray finds the address of a cluster on this machine itself
    host, _, port = target.rpartition(":")
    if not host or not port.isdigit():
        raise UsageError(
            f"{target!r} is no address of a Ray cluster", "Give host:port, usually port 6379, or auto."
        )
    try:
        socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S).close()
    except OSError as error:
        raise UsageError(
            f"nothing answers at {target}: {error}",
            "Check --address and RAY_ADDRESS: they name a running cluster as host:port, usually port 6379.",
        ) from error


def _explain(error: Exception, target: str | None, log: RayLog | None) -> EaglerayError:
    if target is None:
        file = f" Ray's log: {log.path}" if log is not None else ""
        return EaglerayError(f"Ray did not start on this machine: {error}", f"Run `eagleray doctor`.{file}")
    if "uthenticat" in str(error) or "uthenticat" in type(error).__name__:
        return UsageError(
            f"the cluster at {target} wants a token: {error}",
            "Set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH.",
        )
    return UsageError(
        f"cannot join the cluster at {target}: {error}",
        "Check --address and RAY_ADDRESS; this machine must be a node of the cluster. Ray's log: --verbose.",
    )


def _log_dir() -> Path:
    import ray

    # `ray.init` returns it too, but not to whoever is connected already.
    return Path(ray._private.worker._global_node.get_logs_dir_path())


@contextmanager
def _ray_log() -> Iterator[RayLog]:
    """Divert Ray's lines to a file, which is kept only when there was an error to look up."""
    handle, name = tempfile.mkstemp(prefix="eagleray-ray-", suffix=".log")
    os.close(handle)
    log = RayLog(Path(name))
    log.divert()
    keep = True
    try:
        yield log
        keep = False
    except UsageError:
        keep = False  # the call is wrong: there is nothing to look up
        raise
    finally:
        log.restore()
        if not keep:
            log.path.unlink(missing_ok=True)


def _take_sigterm(before: Any) -> None:
    """Take SIGTERM back from `ray.init`; where nobody had set a handler, it ends the process in order."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _exit_in_order if before is signal.SIG_DFL else before)


def _give_sigterm_back(before: Any) -> None:
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)


def _exit_in_order(signal_number: int, _: object) -> None:
    raise SystemExit(128 + signal_number)
