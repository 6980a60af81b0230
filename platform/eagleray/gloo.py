"""Groups of gloo processes that share one event loop.

Every group that torch makes has a gloo device of its own, and every device a thread that wakes a hundred times a
second to look around: a hundred idle groups took 5.6 % of a core in each process, and one run has six to ten of
them. gloo itself lets any number of groups share a device; then they took 0.2 %.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

BACKEND = "gloo_on_one_loop"
NUM_THREADS = 2
"""Of each group, waiting for work without waking: torch's own number."""

_INTERFACES_VARIABLE = "GLOO_SOCKET_IFNAME"


def new_group(
    ranks: Sequence[int] | None = None, *, timeout_s: float, use_local_synchronization: bool = False
) -> dist.ProcessGroup:
    """Make a group of CPU processes, as `torch.distributed.new_group` does; called by all ranks together.

    Args:
        ranks: Global ranks of the members; None: all.
        timeout_s: Seconds after which a collective fails.
        use_local_synchronization: Only the members call.
    """
    group: dist.ProcessGroup = dist.new_group(
        None if ranks is None else list(ranks),
        timeout=timedelta(seconds=timeout_s),
        backend=register(),
        use_local_synchronization=use_local_synchronization,
    )
    return group


def register() -> str:
    """Make the backend known to torch, and return its name."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, devices=["cpu"])
    return BACKEND


def _create(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    gloo: Any = dist.ProcessGroupGloo
    options = gloo._Options()
    options._devices = _devices(os.environ.get(_INTERFACES_VARIABLE, ""))
    options._threads = NUM_THREADS
    options._timeout = timeout
    return gloo(store, rank, size, options)


@functools.cache
def _devices(interfaces: str) -> list[Any]:
    """Return this process's devices: one for each interface that torch's own variable names, else the default."""
    names = [name for name in interfaces.split(",") if name]
    if not names:
        return [dist.ProcessGroupGloo.create_default_device()]
    return [dist.ProcessGroupGloo.create_device(interface=name) for name in names]
