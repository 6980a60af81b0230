"""A layout applied to a model."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from eagleray.config.cutting import micro_batches, uneven_micro_batches
from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel.local import Fill, materialize
from eagleray.parallel.options import ParallelOptions
from eagleray.parallel.pipeline import Pipeline, check_sharded_stages, cut_model
from eagleray.parallel.plan import ParallelPlan, check_styles, check_tensor_plan
from eagleray.parallel.recompute import recompute
from eagleray.parallel.shard import Sharding
from eagleray.parallel.shared_memory import BUCKET_BYTES, share_memory
from eagleray.parallel.stage import LossFunction
from eagleray.parallel.tensor import TensorParallel

_NO_PLAN = ParallelPlan()
_DEFAULTS = ParallelOptions()


def check_supported(layout: Layout, options: ParallelOptions, global_batch_size: int) -> None:
    """Refuse a global batch that a pipeline cannot cut into equal micro-batches.

    Raises:
        ConfigError: It cannot; with the numbers.
    """
    number = micro_batches(layout, options.num_microbatches)
    if uneven := uneven_micro_batches(global_batch_size, layout, number):
        raise ConfigError(*uneven)


def check_device(options: ParallelOptions, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        ConfigError: FSDP's offload on a CPU, where there is nothing to offload from.
    """
    if options.cpu_offload and device.type != "cuda":
        raise ConfigError(
            f"parallel.cpu_offload needs GPUs, but the workers compute on {device.type}: their weights are in the "
            "host's memory already",
            "leave it out",
        )


def check_layout(model: nn.Module, layout: Layout, plan: ParallelPlan, options: ParallelOptions) -> None:
    """Refuse a layout that a model cannot be cut by, before there are ranks.

    Args:
        model: The whole model; `meta` will do. It is not changed.
        layout: The degrees.
        plan: What the model tells about itself.
        options: How the layout would be applied.

    Raises:
        ConfigError: It cannot; with the numbers.
    """
    check_tensor_plan(plan, layout, sequence_parallel=options.sequence_parallel)
    if layout.tensor > 1:
        check_styles(model, plan)
    if layout.pipeline > 1:
        cut = cut_model(model, layout, plan, options)
        if Sharding.is_needed(layout):
            check_sharded_stages(model, plan, cut, options.schedule, layout.pipeline)


def apply_layout(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    plan: ParallelPlan = _NO_PLAN,
    options: ParallelOptions = _DEFAULTS,
    fill: Fill | None = None,
) -> nn.Module:
    """Return what is called for training; parameters keep their names.

    A model on `meta` is cut and sharded before it gets memory, so that a rank holds its own part and no more.
    Gradients are means over the data-parallel ranks.

    Args:
        model: The model: on `meta` with `fill`, or on `device` with its weights.
        layout: The degrees that `mesh` was built from.
        mesh: From `build_mesh`.
        device: Where this rank computes.
        plan: What the model tells about itself.
        options: How the layout is applied.
        fill: What gives a model on `meta` its values.

    Raises:
        ConfigError: The layout cannot be applied to this model.
    """
    assert layout.pipeline == 1, "a pipeline is made by `apply_pipeline`"
    check_device(options, device)
    check_layout(model, layout, plan, options)
    _cut_and_shard(model, model, layout, mesh, plan, options)
    if fill is not None:
        materialize(model, device)
        fill(model)
    if layout.replicate > 1 and not Sharding.is_needed(layout):
        return _replicate(model, mesh, device)
    return model


def apply_pipeline(
    model: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    plan: ParallelPlan,
    options: ParallelOptions,
    loss: LossFunction,
    fill: Fill,
) -> Pipeline:
    """Return this rank's stages of a model on `meta`, each cut, sharded and filled as by `apply_layout`.

    Args:
        model: The whole model, on `meta`; it is not changed.
        layout: The degrees that `mesh` was built from.
        mesh: From `build_mesh`.
        device: Where this rank computes.
        plan: What the model tells about itself.
        options: How the layout is applied.
        loss: The task's loss.
        fill: What gives a stage its values.

    Raises:
        ConfigError: The layout cannot be applied to this model.
    """
    check_layout(model, layout, plan, options)
    pipeline = Pipeline(model, layout, mesh, device, plan=plan, options=options, loss=loss)
    for stage in pipeline.own_stages():
        _cut_and_shard(stage.module, stage, layout, mesh, plan, options)
        materialize(stage, device)
        fill(stage.module)
    pipeline.share_copies()
    return pipeline


def _cut_and_shard(
    model: nn.Module,
    root: nn.Module,
    layout: Layout,
    mesh: DeviceMesh,
    plan: ParallelPlan,
    options: ParallelOptions,
) -> None:
    tensor = None
    if layout.tensor > 1:
        tensor = TensorParallel(plan, mesh["tp"], sequence_parallel=options.sequence_parallel)
    sharding = Sharding(layout, mesh, options) if Sharding.is_needed(layout) else None
    for unit, modules in _units(model, plan):
        if tensor is not None:
            tensor.cut(modules.items())
        if unit is not model:
            recompute(unit, options.activation_checkpointing)
            if sharding is not None:
                for name in modules.keys() & set(plan.read_by_layers) if layout.pipeline > 1 else ():
                    sharding.wrap_layer(modules[name])  # a stage reads it before its layer runs
                sharding.wrap_layer(unit)
    if tensor is not None:
        tensor.cut_sequence(model)
    if sharding is not None:
        sharding.wrap_root(root)


def _units(model: nn.Module, plan: ParallelPlan) -> Iterator[tuple[nn.Module, dict[str, nn.Module]]]:
    """Yield each layer with its modules by name, and at last the model with the modules outside of layers."""
    rest = dict(model.named_modules())
    for name, layer in plan.named_layers(model):
        modules = {f"{name}.{inner}".removesuffix("."): module for inner, module in layer.named_modules()}
        yield layer, modules
        rest = {key: module for key, module in rest.items() if key not in modules}
    yield model, rest


def _replicate(model: nn.Module, mesh: DeviceMesh, device: torch.device) -> nn.Module:
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigError("no parameter is left to train", "model.freeze matches every parameter")
    # Only running statistics (BatchNorm) need rank 0's buffers; position ids never change.
    has_statistics = any(buffer.is_floating_point() for buffer in model.buffers())
    group = mesh.get_group("dp_replicate")
    memory = share_memory(model, group) if device.type == "cpu" else None
    replicated = DistributedDataParallel(
        model,
        device_ids=[device] if device.type == "cuda" else None,
        process_group=group,
        bucket_cap_mb=None if memory is None else BUCKET_BYTES / 2**20,
        forward_sync_buffers=has_statistics,
        gradient_as_bucket_view=True,
    )
    if memory is not None:
        replicated.register_comm_hook(None, memory.exchange)
    return replicated
