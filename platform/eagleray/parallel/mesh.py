"""The workers as a DeviceMesh, and where each stands in it."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.gloo import register

AXES = ("pp", "dp_replicate", "dp_shard", "tp")
"""Axes of the mesh, outermost first, under TorchTitan's names: ranks of one tensor-parallel group share a node."""


@dataclass(frozen=True, slots=True)
class DataCoordinate:
    """Which part of the global batch a rank reads.

    Attributes:
        rank: Its slice, 0 .. world - 1. Ranks of one tensor- or pipeline-parallel group share it.
        world: Number of slices.
        counts: Whether this rank's loss enters the sum over all ranks: one rank of each slice does.
    """

    rank: int
    world: int
    counts: bool = True


def build_mesh(layout: Layout, device_type: str, *, timeout_s: float = 60.0) -> DeviceMesh:
    """Arrange all ranks of the default process group as a mesh.

    Args:
        layout: Degrees; their product is the world size.
        device_type: `cpu` or `cuda`.
        timeout_s: Seconds after which a collective on the mesh fails. torch's own default is half an hour.

    Raises:
        ConfigError: The degrees do not multiply to the number of workers.
    """
    shape = (layout.pipeline, layout.replicate, layout.shard, layout.tensor)
    if layout.num_workers != dist.get_world_size():
        raise ConfigError(
            f"{layout} = {layout.num_workers}, but there are {dist.get_world_size()} workers",
            "set the degrees under parallel so that their product is the number of workers",
        )
    # Groups of its own, since a receive goes by the timeout that its group was made with, and by no later one.
    backends: Any = {axis: _group_options(device_type, timeout_s) for axis in AXES}
    return init_device_mesh(device_type, shape, mesh_dim_names=AXES, backend_override=backends)


def data_coordinate(mesh: DeviceMesh) -> DataCoordinate:
    """Return which slice of the global batch this rank reads."""
    pp, replicate, shard, tp = mesh.get_coordinate() or (0, 0, 0, 0)
    shape = dict(zip(AXES, mesh.shape, strict=True))
    return DataCoordinate(
        rank=replicate * shape["dp_shard"] + shard,
        world=shape["dp_replicate"] * shape["dp_shard"],
        counts=tp == 0 and pp == shape["pp"] - 1,
    )


def group_over_stages(mesh: DeviceMesh, pipeline_ranks: tuple[int, ...]) -> dist.ProcessGroup | None:
    """Make a group of some ranks of every pipeline and return this rank's; called by all ranks together."""
    own = None
    if len(pipeline_ranks) > 1:
        for column in mesh.mesh.reshape(mesh.mesh.shape[0], -1).T.tolist():
            members = [column[rank] for rank in pipeline_ranks]
            backend = register() if mesh.device_type == "cpu" else None
            group = dist.new_group(members, timeout=_timeout_of(mesh), backend=backend)
            own = group if dist.get_rank() in members else own
    return own


def _timeout_of(mesh: DeviceMesh) -> timedelta:
    backend = mesh.get_group("pp")._get_backend(torch.device(mesh.device_type))
    timeout: timedelta = backend.options._timeout
    return timeout


def _group_options(device_type: str, timeout_s: float) -> Any:
    """Return backend and options of a group of ranks; they are where `init_device_mesh` takes a timeout from."""
    options: Any
    if device_type == "cuda":
        backend, options = "nccl", dist.ProcessGroupNCCL.Options()
    else:
        backend, options = register(), dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timedelta(seconds=timeout_s)
    return backend, options
