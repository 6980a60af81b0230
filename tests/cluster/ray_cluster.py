"""The tier's cluster as its tests see it."""

from __future__ import annotations

import contextlib
import random
import socket
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class RayCluster:
    """A running cluster.

    Attributes:
        address: For `--address` and `ray.init`.
        dashboard: `http://host:port` of the Jobs API.
        pid: The process whose descendants the cluster is made of.
    """

    address: str
    dashboard: str
    pid: int

    def find_processes(self, title: str) -> list[psutil.Process]:
        """Return the cluster's processes whose title begins so, for example `ray::RayTrainWorker`."""
        found = []
        for process in psutil.Process(self.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
        return found


def free_port() -> int:
    """Return a port of this machine that nobody uses, and that no outgoing connection is given meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
