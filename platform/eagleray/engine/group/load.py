"""A rank's part of a committed version: cut before it has memory, filled with this rank's ranges alone."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.engine.decoder.cut import CutParts
from eagleray.engine.decoder.families import build_network
from eagleray.engine.decoder.linear import Precision
from eagleray.engine.group.check import check_model, is_decoded_here
from eagleray.engine.group.part import NetworkPart, Part
from eagleray.engine.group.pipe import Pipe
from eagleray.engine.precision import lower_precision
from eagleray.models import base_tensors, check_fit, initialize, is_on_meta, restore_unfilled
from eagleray.models.plans import parallel_plan
from eagleray.models.tied import untie
from eagleray.parallel import ParallelOptions, ParallelPlan, apply_layout, apply_pipeline, build_mesh
from eagleray.parallel.stage import Stage
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.manifest import MODEL_PREFIX
from eagleray.tasks import Task, load_task
from eagleray.tasks.base import batches_itself


def load_part(checkpoint: Checkpoint, layout: Layout, serve: ServeConfig, device: torch.device) -> Part:
    """Load this rank's part; called by all ranks of the default process group together.

    Args:
        checkpoint: The opened version.
        layout: How it is cut; the data-parallel degrees are 1.
        serve: Precision, and the time after which a rank that does not come counts as lost.
        device: Where this rank computes.

    Raises:
        ConfigError: The layout cannot cut this model, or the group cannot do what `serve` asks for.
        CheckpointDamagedError: A byte is not what was committed, or the weights do not fit the model.
    """
    config = checkpoint.config()
    task, model = load_task(config), restore_unfilled(config, checkpoint.files())
    plan = parallel_plan(model)
    check_model(model, plan, layout, serve, config)
    decodes, settings = is_decoded_here(model), _settings(model)
    mesh = build_mesh(layout, device.type, timeout_s=serve.rank_timeout_s)
    fill = Filling(model, checkpoint)
    module, stage = _cut(model, config, task, plan, layout, mesh, device, fill)
    pipe = Pipe(mesh.get_group("pp") if layout.pipeline > 1 else None, device)
    is_first_shard = mesh.get_local_rank("tp") == 0
    network = None
    kept: nn.Module | None = module
    if decodes:
        network = _network(module, stage, plan, serve.dtype, mesh, layout, pipe, is_first_shard=is_first_shard)
        if serve.dtype != "float32" and batches_itself(task.predict):
            kept = None  # the network has its own
    else:
        lower_precision(module, serve.dtype)
    dist.barrier()  # from now on a rank that does not come is late after `rank_timeout_s`
    return Part(
        kept,
        stage,
        pipe,
        network,
        settings if decodes else None,
        device,
        is_first_shard=is_first_shard,
        num_bytes_read=fill.num_bytes_read,
    )


class Filling:
    """Gives a cut model, or a stage of one, its values: each rank reads its own ranges.

    Args:
        model: The whole model, on `meta`; parameters that the checkpoint does not tie are untied.
        checkpoint: The opened version.

    Raises:
        CheckpointDamagedError: The weights do not fit the model.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.num_bytes_read = 0
        self._checkpoint, self._has_no_values = checkpoint, is_on_meta(model)
        tensors = [tensor for tensor in checkpoint.manifest.tensors if tensor.name.startswith(MODEL_PREFIX)]
        shapes = {tensor.name.removeprefix(MODEL_PREFIX): tensor.shape for tensor in tensors}
        untie(model, shapes.keys())
        check_fit(model, shapes)

    def __call__(self, model: nn.Module) -> None:
        """Fill a model or a stage of it."""
        if self._has_no_values:
            initialize(model, None)  # tables that no checkpoint holds
        own = {f"{MODEL_PREFIX}{name}": tensor for name, tensor in base_tensors(model).items()}
        self.num_bytes_read += self._checkpoint.load_into(own)


def _cut(
    model: nn.Module,
    config: RunConfig,
    task: Task,
    plan: ParallelPlan,
    layout: Layout,
    mesh: DeviceMesh,
    device: torch.device,
    fill: Filling,
) -> tuple[nn.Module, Stage | None]:
    options = ParallelOptions(length=config.data.max_source_length)
    model.eval().requires_grad_(False)
    if layout.pipeline == 1:
        return apply_layout(model, layout, mesh, device, plan=plan, options=options, fill=fill).eval(), None
    pipeline = apply_pipeline(model, layout, mesh, device, plan=plan, options=options, loss=task.loss, fill=fill)
    (stage,) = pipeline.own_stages()
    stage.eval()
    return stage.module, stage


def _network(
    module: nn.Module,
    stage: Stage | None,
    plan: ParallelPlan,
    precision: Precision,
    mesh: DeviceMesh,
    layout: Layout,
    pipe: Pipe,
    *,
    is_first_shard: bool,
) -> NetworkPart:
    group = mesh.get_group("tp") if layout.tensor > 1 else None
    network = build_network(module, precision, partial(CutParts, group=group))
    hf_model: Any = module
    is_cut = pipe.is_last and isinstance(hf_model.lm_head.weight, DTensor)
    return NetworkPart(
        network,
        pipe,
        opens_decoder=stage is None or stage.opens_part(1),
        tells_scores=pipe.is_last and (is_cut or is_first_shard),
    )


def _settings(model: nn.Module) -> dict[str, Any] | None:
    config = getattr(model, "generation_config", None)
    return None if config is None else config.to_dict()
