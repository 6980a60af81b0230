"""Starting a Ray of our own on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import psutil

NUM_ATTEMPTS = 2
END_TIMEOUT_S = 5.0

ENVIRONMENT = {
    # Ray runs workers at nice 15, so that its own processes come first. On a machine that trains or serves the
    # workers are what matters: two of them in step lost 9 and 17 % of their speed to whatever else woke up.
    "RAY_worker_niceness": "0",
    # Ray warns about a change of its own that does not concern us.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
"""What Ray's processes inherit; what the user has set stays."""


def start_local_ray(init: Callable[..., Any], **options: Any) -> None:
    """Start Ray, once more if it did not come up in time.

    Ray gives its node 30 s, whatever the machine is busy with, and has no key for that.

    Args:
        init: `ray.init`.
        options: Its arguments, apart from the address.

    Raises:
        Exception: What Ray raised.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for attempt in range(1, NUM_ATTEMPTS + 1):
        before = set(psutil.Process().children())
        try:
            init(address="local", **options)
            return
        except Exception as error:
            if attempt == NUM_ATTEMPTS or "timed out" not in str(error).lower():
                raise
            end_processes(set(psutil.Process().children()) - before)


def stop_log_monitor() -> None:
    """End the process that follows the workers' logs for a driver which does not show them.

    Ray starts it whatever `log_to_driver` says, and it looks into every file ten times a second: a hundredth of a
    core. The files are where they were.
    """
    import ray

    node = ray._private.worker._global_node
    if node is not None:
        node.kill_log_monitor(check_alive=False)


def end_processes(processes: set[psutil.Process]) -> None:
    """End what a failed start has left, and wait for it."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
    psutil.wait_procs(processes, timeout=END_TIMEOUT_S)
