"""Memory of a worker: the limit that it is held to, and which failures mean that there was not enough."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import re
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from eagleray.errors import WorkerMemoryError

POLL_S = 0.02
GIVE_BACK_INTERVAL_S = 1.0
ROOM_SHARE = 0.95
"""Of a limit, for what is planned: a peak may lie between two looks, and the next step may have longer rows."""
LARGE_BLOCK_BYTES = 1 << 20
LARGE_UNIT_BYTES = 8 << 20
"""Smaller layers are gathered into blocks that do no harm in the heap, and are quicker there."""
_M_MMAP_THRESHOLD = -3
_STATM = Path("/proc/self/statm")
_VMSTAT = Path("/proc/vmstat")

_ALLOCATORS = ("can't allocate memory", "out of memory", "not enough memory", "std::bad_alloc")
"""What torch's allocators say: on a CPU they raise plain RuntimeErrors."""

_RAY_MONITOR = re.compile(r"[^\n]*(low on memory|memory usage threshold)[^\n]*")
"""What Ray says when its memory monitor ended a worker. Of any worker that died it says that the kernel's
out-of-memory killer may have been it."""


class MemoryGuard:
    """Watches the memory that this process alone holds, in a thread, while a context lasts.

    Resident pages that no file backs are counted: neither libraries and mapped data, which the kernel can drop,
    nor address space, which torch reserves freely. Under a limit the allocator gives large blocks back when they
    are freed, which costs some speed; small ones are given back before a process counts as over its limit, at most
    once a second.

    Args:
        limit_bytes: What it may hold; None: nothing is watched.
        exceeded: Called in the thread, once, with the bytes that it holds instead.
    """

    def __init__(self, limit_bytes: int | None, exceeded: Callable[[int], None]) -> None:
        self._limit_bytes, self._exceeded = limit_bytes, exceeded
        self._peak_bytes = 0
        self._closed = threading.Event()

    def __enter__(self) -> MemoryGuard:
        if self._limit_bytes is not None:
            return_large_blocks()
            threading.Thread(target=self._watch, args=(self._limit_bytes,), name="memory", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()

    def has_room(self, num_bytes: int) -> bool:
        """Say whether this process could hold so much more than it ever held, and stay within its limit."""
        if self._limit_bytes is None:
            return True
        return max(self._peak_bytes, own_memory_bytes()) + num_bytes <= ROOM_SHARE * self._limit_bytes

    def _watch(self, limit_bytes: int) -> None:
        given_back_at = 0.0
        while not self._closed.wait(POLL_S):
            held = own_memory_bytes()
            self._peak_bytes = max(self._peak_bytes, held)
            if held <= limit_bytes:
                continue
            if time.monotonic() > given_back_at + GIVE_BACK_INTERVAL_S:
                give_back_free_memory()
                given_back_at = time.monotonic()
            if (held := own_memory_bytes()) > limit_bytes:
                self._exceeded(held)
                return


def own_memory_bytes() -> int:
    """Return the resident memory of this process that no file backs."""
    if _STATM.exists():
        _, resident, shared, *_ = map(int, _STATM.read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    import psutil

    return int(psutil.Process().memory_info().rss)


def return_large_blocks() -> None:
    """Let the C library's allocator return large blocks when they are freed; glibc only.

    It learns from each freed block to keep those up to 32 MB, which are a layer's weights.
    """
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def keep_heap_small(device_type: str, gathered_bytes: int) -> None:
    """Let a sharded model save memory on a CPU, too.

    FSDP takes and frees the memory of a layer several times a step. torch aligns every block, and glibc 2.36 does
    not find a freed block again for an aligned one of the same size: the heap outgrew that of unsharded training.

    Args:
        device_type: Where the model is.
        gathered_bytes: Of the weights that are gathered together.
    """
    if device_type == "cpu" and gathered_bytes >= LARGE_UNIT_BYTES:
        return_large_blocks()


def spare_the_collector() -> None:
    """Take what exists now out of the sight of Python's collector: it stays until the process ends.

    torch and transformers alone are a million objects. A save makes many new ones for its manifest, which has
    Python look through all of them: 0.3 s, in which this rank holds up all others.
    """
    gc.collect()
    gc.freeze()


def give_back_free_memory() -> None:
    """Return to the kernel what the C library's allocator keeps of freed memory; glibc only."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def as_memory_error(world_rank: int, error: BaseException) -> WorkerMemoryError | None:
    """Return an error of ours for what torch, CUDA or Python raise where memory is out; None: it is not that."""
    text = str(error)
    is_known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not is_known and not (isinstance(error, RuntimeError) and any(w in text.lower() for w in _ALLOCATORS)):
        return None
    first_line = text.strip().partition("\n")[0] or type(error).__name__
    found = WorkerMemoryError(f"rank {world_rank} ran out of memory: {first_line}")
    found.__cause__ = error
    return found


def over_limit(world_rank: int, held_bytes: int, limit_bytes: int) -> WorkerMemoryError:
    """Describe a worker that was ended because of its limit."""
    return WorkerMemoryError(
        f"rank {world_rank} held {show_bytes(held_bytes)} of memory of its own; "
        f"resources.worker_memory_limit_bytes is {limit_bytes} ({show_bytes(limit_bytes)})"
    )


def ended_for_memory(deaths: Iterable[str], num_kills: int) -> str | None:
    """Say who ended a worker because of its memory; None: nobody is known to have done it.

    Args:
        deaths: All that Ray says about the workers that died.
        num_kills: How many processes this machine's out-of-memory killer has ended since the workers began.
    """
    found = next((match for text in deaths if (match := _RAY_MONITOR.search(text))), None)
    if found is not None:
        return found[0].strip()
    return "the out-of-memory killer of this machine was at work" if num_kills > 0 else None


def kernel_kills() -> int:
    """Return how many processes the out-of-memory killer of this machine has ended since it started."""
    lines = _VMSTAT.read_text().splitlines() if _VMSTAT.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def show_bytes(number: float) -> str:
    """Spell a number of bytes for people, with three digits."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
