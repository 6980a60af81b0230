"""A Ray head that is ours alone: on loopback, with a token, in its own folder, ending with this process."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from eagleray.cluster import NAMESPACE
from eagleray.errors import EaglerayError, ServingError
from eagleray.local_ray import start_local_ray, stop_log_monitor
from eagleray.resources import count_cpus
from eagleray.telemetry import RayLog
from eagleray_serving.front import Front, RequestLimits, environment

OBJECT_STORE_BYTES = 256 * 1024 * 1024


@contextmanager
def own_head(front: Front, folder: Path, limits: RequestLimits, log_path: Path, verbose: bool) -> Iterator[None]:
    """Start Ray for one server.

    The environment of this process is changed for good: Ray reads its settings when it is first imported, and its
    processes inherit them.

    Args:
        front: The front that Serve will start.
        folder: The server's own folder.
        limits: What the front holds requests to.
        log_path: Where Ray's log lines of this process go; kept when something fails.
        verbose: Leave them on the terminal instead.

    Raises:
        ServingError: Ray did not start.
    """
    assert "ray" not in sys.modules, "Ray is imported already: it would not see these settings"
    for name in ("RAY_ADDRESS", "RAY_AUTH_TOKEN", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        os.environ.pop(name, None)
    os.environ.update(environment(front, folder, limits))
    os.environ.update(_own_environment(folder))
    log = None if verbose else RayLog(log_path)
    try:
        _start(folder, log)
        yield
    except EaglerayError as error:
        if log is not None and log_path.exists():
            error.hint = "; ".join(filter(None, [error.hint, f"Ray's log: {log_path}"]))
        raise
    else:
        log_path.unlink(missing_ok=True)
    finally:
        _end(log)


def ray_is_alive() -> bool:
    """Whether the head still answers."""
    import ray

    try:
        return any(node["Alive"] for node in ray.nodes())
    except Exception:  # whatever it is, the head is of no use any more
        return False


def _own_environment(folder: Path) -> dict[str, str]:
    token = folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        # Ray's switch for desktop systems: without it GCS, raylet and workers listen on all interfaces.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Ray's agents wish to report the death of their node to a GCS that died with it, for a minute by default.
        "RAY_gcs_rpc_server_reconnect_timeout_s": "5",
        "RAY_USAGE_STATS_ENABLED": "0",
    }


def _start(folder: Path, log: RayLog | None) -> None:
    import ray
    import ray.serve

    if log is not None:
        log.divert()
    verbose = log is None
    try:
        start_local_ray(
            ray.init,
            num_cpus=count_cpus(),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            namespace=NAMESPACE,
            configure_logging=verbose,
            log_to_driver=verbose,
            _temp_dir=str(folder / "r"),
        )
    except Exception as error:
        raise ServingError(f"Ray did not start: {error}", "eagleray doctor looks at this machine") from error
    if log is not None:
        log.divert()
        stop_log_monitor()


def _end(log: RayLog | None) -> None:
    import ray

    with suppress(Exception):  # what is left of it ends with this process
        ray.shutdown()
    if log is not None:
        log.restore()
