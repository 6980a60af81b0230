"""Whether one more version fits into memory beside those that are there."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from eagleray.store.manifest import MODEL_PREFIX, Manifest

# The stored weights, the model that they are copied into, and what the engine makes of them (fused, or in another
# precision): the most that is there at once while a version is loaded.
COPIES = 3.0
# Left to everything else.
SPARE_BYTES = 256 * 2**20
CGROUP = Path("/sys/fs/cgroup")


class NoRoomError(Exception):
    """A version does not fit beside the current one; the message says what it needs and what there is."""


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let one process of this machine and user load at a time: each sees what the one before it took."""
    path = Path(tempfile.gettempdir()) / f"eagleray-loading-{os.getuid()}.lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # the kernel lets go of it when its process dies
        yield
    finally:
        os.close(descriptor)


def no_room(manifest: Manifest, *, gpu: bool) -> str | None:
    """Say why a version does not fit beside the current one; None: it does.

    Args:
        manifest: Of the version.
        gpu: Whether it goes to a GPU.
    """
    weights = weight_bytes(manifest)
    checks = [("memory", free_bytes(), int(weights * COPIES) + SPARE_BYTES)]
    if gpu:
        import torch

        checks.append(("GPU memory", torch.cuda.mem_get_info()[0], int(weights * 2)))
    for what, free, needed in checks:
        if free < needed:
            return f"loading {manifest.version} needs {_shown(needed)} of {what}, and {_shown(free)} are free"
    return None


def weight_bytes(manifest: Manifest) -> int:
    """Return the bytes of a version's weights, without those of its optimizer."""
    return sum(tensor.size_bytes for tensor in manifest.tensors if tensor.name.startswith(MODEL_PREFIX))


def free_bytes() -> int:
    """Return the memory that this process may still take: of the machine, or of its container if that has less."""
    free = psutil.virtual_memory().available
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        kept = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return int(free)  # no container, or none that tells
    if limit == "max":
        return int(free)
    # Pages of files are given back when memory is short.
    return int(min(free, int(limit) - used + int(kept.get("inactive_file", 0))))


def _shown(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.0f} MiB"
