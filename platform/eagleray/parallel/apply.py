"""A layout applied to a model."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError


def check_supported(layout: Layout) -> None:
    """Refuse a layout that cannot be applied.

    Raises:
        ConfigError: A degree other than data_parallel_replicate_degree is above 1.
    """
    degrees = {
        "data_parallel_shard_degree": layout.shard,
        "tensor_parallel_degree": layout.tensor,
        "pipeline_parallel_degree": layout.pipeline,
    }
    given = [f"parallel.{name}: {degree}" for name, degree in degrees.items() if degree > 1]
    if given:
        raise ConfigError(
            f"{' and '.join(given)} cannot be trained by this version: only replicas work (DDP)",
            "set these degrees to 1 and parallel.data_parallel_replicate_degree to the number of workers",
        )


def apply_layout(model: nn.Module, layout: Layout, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    """Return what is called for training; parameters keep their identity and the module its names.

    Args:
        model: The model on `device`, with its weights.
        layout: The degrees that `mesh` was built from.
        mesh: From `build_mesh`.
        device: Where this rank computes.

    Raises:
        ConfigError: The layout cannot be applied.
    """
    check_supported(layout)
    return _replicate(model, mesh, device)


def _replicate(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter is left to train", "model.freeze matches every parameter")
    # Only running statistics (BatchNorm) need rank 0's buffers; position ids never change.
    has_statistics = any(buffer.is_floating_point() for buffer in model.buffers())
    return DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=mesh.get_group("dp_replicate"),
        broadcast_buffers=has_statistics,
        gradient_as_bucket_view=True,
    )
