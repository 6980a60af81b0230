"""What a run asks of a cluster, and whether the cluster has it: pure arithmetic, without Ray."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

Resources = Mapping[str, float]
_CGROUP_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")


@dataclass(frozen=True, slots=True)
class ResourceRequest:
    """A number of equal bundles, each of which must fit on one node.

    Attributes:
        num_bundles: How many workers or replicas.
        bundle: Ray resources of each, for example `{"CPU": 1.0, "GPU": 1.0}`.
        noun: What a bundle is called in a message.
        setting: The key of the file that sets the bundle, named in a message.
    """

    num_bundles: int
    bundle: Resources
    noun: str = "workers"
    setting: str = "resources.resources_per_worker"

    def total(self) -> dict[str, float]:
        """Return what all bundles ask for together."""
        return {name: amount * self.num_bundles for name, amount in self.bundle.items()}


@dataclass(frozen=True, slots=True)
class Shortage:
    """Why a request cannot be placed.

    Attributes:
        message: What is asked and what there is, with the numbers.
        hint: What to set.
        missing: Amount per resource that would have to be added.
    """

    message: str
    hint: str
    missing: dict[str, float] = field(default_factory=dict)


def find_shortage(request: ResourceRequest, nodes: Sequence[Resources], where: str) -> Shortage | None:
    """Return why `request` can never be placed on `nodes`, or None if it can.

    Args:
        request: Equal bundles, so that counting them node by node is exact.
        nodes: Resources of each node, whether in use or not.
        where: What the nodes are in a message: "this machine", "the cluster at 10.0.0.1:6379".
    """
    for name, asked in request.total().items():
        available = sum(node.get(name, 0.0) for node in nodes)
        if asked > available + 1e-9:
            return _too_little(request, name, asked, available, where)
    placeable = sum(_bundles_on(node, request.bundle) for node in nodes)
    if placeable < request.num_bundles:
        each = ", ".join(f"{name} {amount:g}" for name, amount in request.bundle.items())
        return Shortage(
            f"{request.num_bundles} {request.noun} of {each} each do not fit on the nodes of {where}: "
            f"only {placeable} of them do",
            f"Each of them must fit on one node: lower {request.setting}.",
            {name: amount * (request.num_bundles - placeable) for name, amount in request.bundle.items()},
        )
    return None


def _too_little(request: ResourceRequest, name: str, asked: float, available: float, where: str) -> Shortage:
    each = request.bundle[name]
    if name == "GPU" and available == 0:
        hint = "Set resources.use_gpu to false, or join a cluster that has GPUs with --address."
    else:
        most = int(available / request.num_bundles * 100) / 100
        hint = f"Set {request.setting}.{name} to at most {most:g}, or ask for fewer {request.noun}."
    return Shortage(
        f"{request.num_bundles} {request.noun} x {name} {each:g} = {name} {asked:g}, "
        f"but {where} has {name} {available:g}",
        hint,
        {name: asked - available},
    )


def _bundles_on(node: Resources, bundle: Resources) -> int:
    counts = [int((node.get(name, 0.0) + 1e-9) / amount) for name, amount in bundle.items() if amount > 0]
    return min(counts) if counts else 10**9


def count_cpus() -> int:
    """Return the CPUs that this process may use: affinity and the container's quota, at least 1."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _cgroup_quota()
    return max(1, count if quota is None else min(count, int(quota)))


def _cgroup_quota() -> float | None:
    try:
        limit, period = _CGROUP_CPU_MAX.read_text().split()
    except (OSError, ValueError):
        return None  # no cgroup v2 here: the affinity alone counts
    return None if limit == "max" else float(limit) / float(period)


def count_gpus() -> int:
    """Return the GPUs that torch sees; torch is imported only where a device node of a GPU exists."""
    patterns = ("nvidia[0-9]*", "kfd", "dxg")
    if not any(True for pattern in patterns for _ in Path("/dev").glob(pattern)):
        return 0
    import torch

    return torch.cuda.device_count()
