"""Further nodes of the tier's cluster: raylets of their own on this machine."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

JOIN_TIMEOUT_S = 90.0
SLOT = "slot"
"""A resource of which every node of the tier has one: workers that ask for it stand on different nodes."""

EPHEMERAL_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "metrics-export-port",
)


def can_hide_mounts() -> bool:
    """Whether this machine lets a process have mounts of its own."""
    return subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode == 0


@contextmanager
def joined_node(
    address: str, environment: dict[str, str], *, hidden: Path | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a raylet with one slot, and end it with the context.

    Args:
        address: The cluster.
        environment: Of the cluster.
        hidden: A directory in whose place the node sees an empty one of its own.
    """
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "start", "--block", f"--address={address}", "--num-cpus=2", "--object-store-memory=100000000"]
    command += [f"--resources={json.dumps({SLOT: 1})}", *(f"--{name}=0" for name in EPHEMERAL_PORTS)]
    if hidden is not None:
        script = f"mount -t tmpfs none {shlex.quote(str(hidden))} && exec {shlex.join(command)}"
        command = ["unshare", "--mount", "sh", "-c", script]
    node = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        _await_raylet(node)
        yield node
    finally:
        kill_node(node)


def kill_node(node: subprocess.Popen[bytes]) -> None:
    """SIGKILL every process of a node at once, as a power cut does."""
    if node.poll() is None:
        top = psutil.Process(node.pid)
        for process in [*top.children(recursive=True), top]:
            process.kill()
    node.wait()


def _await_raylet(node: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + JOIN_TIMEOUT_S
    while not any("raylet" in process.name() for process in psutil.Process(node.pid).children(recursive=True)):
        if node.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the node did not start (status {node.poll()})")
        time.sleep(0.2)
