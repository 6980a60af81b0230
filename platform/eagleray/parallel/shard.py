"""Sharded data parallelism by FSDP2 (Rajbhandari et al. 2019, ZeRO stage 3, arXiv 1910.02054)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)

from eagleray.config.layout import Layout
from eagleray.parallel.options import ParallelOptions


class Sharding:
    """Wraps modules, each as one unit whose weights are gathered and freed together.

    With replicas as well this is HSDP; replicas alone come here where tensor parallelism or a pipeline makes the
    weights something that DDP cannot hold: their shards are then whole.

    Args:
        layout: The degrees.
        mesh: All workers; its axes `dp_replicate` and `dp_shard` are used.
        options: Precision, and when weights are freed.
    """

    def __init__(self, layout: Layout, mesh: DeviceMesh, options: ParallelOptions) -> None:
        axes = ("dp_replicate", "dp_shard") if layout.replicate > 1 else ("dp_shard",)
        self._mesh = mesh[axes]
        self._reshard = options.reshard_after_forward
        self._precision = MixedPrecisionPolicy()
        if options.bf16:
            self._precision = MixedPrecisionPolicy(
                param_dtype=torch.bfloat16, reduce_dtype=torch.float32, output_dtype=torch.float32
            )
        self._offload = CPUOffloadPolicy() if options.cpu_offload else OffloadPolicy()
        self._layer_precision = MixedPrecisionPolicy(
            param_dtype=self._precision.param_dtype, reduce_dtype=self._precision.reduce_dtype
        )

    @staticmethod
    def is_needed(layout: Layout) -> bool:
        """Say whether a layout has data-parallel ranks that DDP is not used for."""
        pure_replicas = layout.shard == layout.tensor == layout.pipeline == 1
        return layout.num_data_ranks > 1 and not pure_replicas

    def wrap_layer(self, layer: nn.Module) -> None:
        """Make a layer a unit."""
        fully_shard(
            layer,
            mesh=self._mesh,
            mp_policy=self._layer_precision,
            reshard_after_forward=self._reshard,
            offload_policy=self._offload,
        )

    def wrap_root(self, model: nn.Module) -> None:
        """Make what the layers leave a unit; it stays gathered, since the backward pass begins with it."""
        fully_shard(
            model,
            mesh=self._mesh,
            mp_policy=self._precision,
            reshard_after_forward=False,
            offload_policy=self._offload,
        )


def gathered_bytes(model: nn.Module) -> int:
    """Return the bytes of a sharded model's largest unit, whose weights are gathered together; 0: it has none."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    largest, counted = 0, set[nn.Parameter]()
    for unit in reversed(units):  # inner ones come after those that hold them
        own = set(unit.parameters()) - counted
        counted |= own
        largest = max(largest, sum(parameter.numel() * parameter.element_size() for parameter in own))
    return largest


@contextmanager
def gathered(model: nn.Module, *, reshard_after_forward: bool) -> Iterator[nn.Module]:
    """Hold the whole weights of a sharded model on every rank, so that its submodules can be called directly.

    Text generation does that; and ranks that generate different numbers of tokens would wait for each other's
    collectives for ever. Called by all ranks together; nothing happens to a model that is not sharded.

    Args:
        model: The model that `apply_layout` sharded.
        reshard_after_forward: What it was sharded with, and goes back to.
    """
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    resharded = [unit for unit in units if unit is not model]
    for unit in units:
        unit.unshard()
    for unit in resharded:
        unit.set_reshard_after_forward(False, recurse=False)
    try:
        yield model
    finally:
        for unit in units:
            unit.reshard()
        for unit in resharded:
            unit.set_reshard_after_forward(reshard_after_forward, recurse=False)
