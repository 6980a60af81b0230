"""One local Ray for the whole tier, with what a real cluster has: Jobs API, HAProxy, token authentication.

The cluster is a process of its own, so that the command line under test joins it by address. It ends when its
standard input closes, that is with the test session, whichever way that ends.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray_cluster import RayCluster, free_port
from train_runs import LAST, CommandLine, FinishedRun, weights, write_run

HEAD = """
import json, sys
import ray

options = json.loads(sys.argv[1])
quiet = {"log_to_driver": False, "configure_logging": False}
context = ray.init(address="local", include_dashboard=True, **quiet, **options)
print(json.dumps({"address": context.address_info["gcs_address"], "dashboard": context.dashboard_url}), flush=True)
sys.stdin.read()
ray.shutdown()
"""
NUM_CPUS = 8
START_TIMEOUT_S = 120.0


def cluster_environment() -> dict[str, str]:
    """What the head, its workers and everything that joins them have in their environment."""
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(16),
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
        "RAY_JOB_STOP_WAIT_TIME_S": "30",
        "RAY_worker_niceness": "0",
        "RAY_health_check_period_ms": "1000",  # a node counts as dead after five of them
    }


def serve_environment(folder: Path) -> dict[str, str]:
    """Where Serve's front has its files and ports: Serve's own defaults are one place for the whole machine."""
    first = free_port()
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first + 100),
    }


@pytest.fixture(scope="session")
def ray_environment(s3_bucket: str) -> Iterator[dict[str, str]]:
    """The environment of the tier, also set in this process for the length of the session; it knows the bucket."""
    added = cluster_environment()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in added.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        yield dict(os.environ)


@pytest.fixture(scope="session")
def ray_cluster(ray_environment: dict[str, str]) -> Iterator[RayCluster]:
    """The one cluster of the tier: 8 logical CPUs, whatever the machine has."""
    # A socket's path is limited to 107 bytes: pytest's own temporary directories are too deep.
    with tempfile.TemporaryDirectory(prefix="er-", ignore_cleanup_errors=True) as folder:
        options = {
            "num_cpus": NUM_CPUS,
            "resources": {"slot": 1},
            "dashboard_port": free_port(),
            "_temp_dir": folder,
        }
        log = Path(folder, "head.log").open("w")
        head = subprocess.Popen(
            [sys.executable, "-c", HEAD, json.dumps(options)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            env=ray_environment | serve_environment(Path(folder)),
            text=True,
            start_new_session=True,  # Ctrl-C on the tests is not for the cluster
        )
        try:
            yield _started(head, Path(log.name))
        finally:
            _stop(head)
            log.close()


def _started(head: subprocess.Popen[str], log: Path) -> RayCluster:
    assert head.stdout is not None
    line = head.stdout.readline()
    if not line:
        raise RuntimeError(f"Ray did not start:\n{log.read_text()[-4000:]}")
    found = json.loads(line)
    return RayCluster(found["address"], f"http://{found['dashboard']}", head.pid)


def _stop(head: subprocess.Popen[str]) -> None:
    assert head.stdin is not None and head.stdout is not None
    head.stdin.close()
    try:
        head.wait(timeout=60)
    except subprocess.TimeoutExpired:
        head.kill()  # its raylet and GCS die with it
        head.wait()
    head.stdout.close()


@pytest.fixture(scope="session")
def command_line(ray_environment: dict[str, str]) -> CommandLine:
    """`command_line.run("train", file, ...)` calls `eagleray` in a process of its own."""
    return CommandLine(ray_environment)


@pytest.fixture(scope="session")
def undisturbed(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """A run of two workers from its first step to its last, which every disturbed one must equal."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file, store = write_run(folder), folder / "store"
    done = command_line.run("train", file, "--address", ray_cluster.address, "--store", store)
    assert done.status == 0, done.stderr
    return FinishedRun(file, store, done, weights(store, LAST))
