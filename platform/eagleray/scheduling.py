"""Which parts of a run give way to which where there are more of them than cores.

Linux lets a thread that wakes up interrupt the one that runs, unless it is a batch thread. Workers that compute in
step wait for each other at every step, so what interrupts one of them holds up all. What stands around them (Ray's
own processes, the driver, a thread that collates the next batch) runs as batch: it has its turn when a worker
waits or milliseconds later, and as much of the processor as before. A process may ask for that and take it back
without privileges, which is not true of its niceness. Elsewhere than on Linux nothing is done.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def giving_way() -> Iterator[None]:
    """Make this thread a batch thread, and with it the threads and processes that it starts meanwhile."""
    give_way()
    try:
        yield
    finally:
        come_first()


def give_way() -> None:
    """Make this thread a batch thread from here on."""
    if sys.platform == "linux":
        _set_policy(os.SCHED_BATCH)


def come_first() -> None:
    """Make this thread an ordinary one where it is a batch thread, and those that it starts later with it."""
    if sys.platform == "linux" and os.sched_getscheduler(0) == os.SCHED_BATCH:
        _set_policy(os.SCHED_OTHER)


def _set_policy(policy: int) -> None:
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox may forbid it, and nothing depends on it
            os.sched_setscheduler(0, policy, os.sched_param(0))
