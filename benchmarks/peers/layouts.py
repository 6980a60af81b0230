"""Loops as one writes them by hand for torchrun with plain torch: FSDP2, tensor parallelism, a pipeline.

Their losses are means of each rank's own mean, or of each micro-batch's, so they are not quite right with lengths
that differ; they restart nothing, save nothing and do not check for NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from eagleray.config.schema import TrainConfig
from eagleray.tasks import Batch
from eagleray_jobs.train.schedule import learning_rate

Cut = Callable[[Any], nn.Module]
COLUMNS, ROWS = ("q_proj", "k_proj", "v_proj", "fc1"), ("out_proj", "fc2")
NUM_MICRO_BATCHES = 4


def replicate(model: Any) -> nn.Module:
    """DDP."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True)


def shard(model: Any) -> nn.Module:
    """FSDP2, a unit for each layer."""
    return _shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def shard_and_replicate(model: Any) -> nn.Module:
    """HSDP: two replicas of shards."""
    return _shard(model, init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("dp", "shard")))


def cut_tensors(model: Any) -> nn.Module:
    """Tensor parallelism by torch's own styles; embeddings and norms stay whole."""
    return _cut_tensors(model, init_device_mesh("cpu", (dist.get_world_size(),)))


def cut_and_shard(model: Any) -> nn.Module:
    """Tensor parallelism of two inside of FSDP2."""
    mesh = init_device_mesh("cpu", (dist.get_world_size() // 2, 2), mesh_dim_names=("shard", "tp"))
    return _shard(_cut_tensors(model, mesh["tp"]), mesh["shard"])


def train_model(
    model: nn.Module, cut: Cut, train: TrainConfig, batches: Iterable[Batch], step_ended: Callable[[], None]
) -> None:
    """Train on this rank's batches, one step each."""
    assert train.max_steps is not None
    called = cut(model)
    optimizer = _optimizer(called, train)
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step, train.max_steps)
        optimizer.zero_grad()
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
        logits = called(**inputs, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)
        loss.backward()  # type: ignore[no-untyped-call]
        _clip(called.parameters(), 1.0)
        optimizer.step()
        step_ended()


class Encoder(nn.Module):
    """The first stage."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.encoder = model.model.encoder

    def forward(self, input_ids: Tensor, *, attention_mask: Tensor, **_: Tensor) -> Tensor:
        hidden: Tensor = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return hidden.contiguous()


class Decoder(nn.Module):
    """The second stage, with the head."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder, self.head = model.model.decoder, model.lm_head
        self.register_buffer("bias", model.final_logits_bias)

    def forward(self, hidden: Tensor, *, attention_mask: Tensor, decoder_input_ids: Tensor, **_: Tensor) -> Tensor:
        output = self.decoder(
            input_ids=decoder_input_ids, encoder_hidden_states=_contiguous_gradient(hidden),
            encoder_attention_mask=attention_mask, use_cache=False,
        )  # fmt: skip
        logits: Tensor = self.head(output.last_hidden_state) + self.bias
        return logits


def train_pipeline(
    model: Any, train: TrainConfig, batches: Iterable[Batch], step_ended: Callable[[], None]
) -> None:
    """Train the encoder on rank 0 and the decoder on rank 1, by 1F1B."""
    assert train.max_steps is not None
    rank, embeddings = dist.get_rank(), model.model.shared.weight
    stage = (Encoder, Decoder)[rank](model)
    optimizer = _optimizer(stage, train)
    schedules: dict[tuple[int, ...], Schedule1F1B] = {}
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step, train.max_steps)
        optimizer.zero_grad()
        shape = (*batch["input_ids"].shape, *batch["decoder_input_ids"].shape)
        if shape not in schedules:  # the buffers of messages have one shape
            schedules[shape] = _schedule(stage, rank, tuple(embeddings.shape), batch)
        masks = {name: batch[name] for name in ("attention_mask", "decoder_input_ids")}
        if rank == 0:
            schedules[shape].step(batch["input_ids"], **masks)
        else:
            schedules[shape].step(target=batch["labels"], losses=[], **masks)
        dist.all_reduce(embeddings.grad)  # tied: both stages hold a copy
        _clip_over_stages(stage.parameters(), embeddings, 1.0)
        optimizer.step()
        step_ended()


def _schedule(stage: nn.Module, rank: int, sizes: tuple[int, int], batch: Batch) -> Schedule1F1B:
    vocab_size, width = sizes
    rows = batch["input_ids"].shape[0] // NUM_MICRO_BATCHES
    hidden = torch.zeros(rows, batch["input_ids"].shape[1], width, requires_grad=True)
    ids = batch["input_ids"][:rows]
    logits = torch.zeros(*batch["decoder_input_ids"][:rows].shape, vocab_size, requires_grad=True)
    before, after = ((ids,), (hidden,)) if rank == 0 else ((hidden,), (logits,))
    part = PipelineStage(stage, rank, 2, torch.device("cpu"), input_args=before, output_args=after)
    return Schedule1F1B(part, NUM_MICRO_BATCHES, loss_fn=_loss)


def _loss(logits: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)


class _Contiguous(torch.autograd.Function):
    """gloo sends no gradient that is not contiguous."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient.contiguous()


def _contiguous_gradient(x: Tensor) -> Tensor:
    result: Tensor = _Contiguous.apply(x)  # type: ignore[no-untyped-call]
    return result


def _layers(model: Any) -> Iterator[nn.Module]:
    yield from (*model.model.encoder.layers, *model.model.decoder.layers)


def _shard(model: Any, mesh: DeviceMesh) -> nn.Module:
    for layer in _layers(model):
        fully_shard(layer, mesh=mesh)
    sharded: nn.Module = fully_shard(model, mesh=mesh, reshard_after_forward=False)
    return sharded


def _cut_tensors(model: Any, mesh: DeviceMesh) -> Any:
    for layer in _layers(model):
        names = [name for name, _ in layer.named_modules()]
        plan: dict[str, Any] = {name: ColwiseParallel() for name in names if name.endswith(COLUMNS)}
        plan |= {name: RowwiseParallel() for name in names if name.endswith(ROWS)}
        parallelize_module(layer, mesh, plan)
    return model


def _optimizer(model: nn.Module, train: TrainConfig) -> torch.optim.Optimizer:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    meshes = {getattr(parameter, "device_mesh", None) for parameter in trained}
    groups = [{"params": [p for p in trained if getattr(p, "device_mesh", None) == mesh]} for mesh in meshes]
    return torch.optim.AdamW(groups, lr=train.learning_rate, weight_decay=0.0, fused=True)


def _clip(parameters: Iterable[nn.Parameter], limit: float) -> None:
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    # A norm knows one mesh: under FSDP over TP some parameters are on that of the shards alone. In the order of
    # the parameters, which is the same on all ranks: each norm is a collective.
    meshes = dict.fromkeys(getattr(gradient, "device_mesh", None) for gradient in gradients)
    norms = []
    for mesh in meshes:
        norm = torch.nn.utils.get_total_norm([g for g in gradients if getattr(g, "device_mesh", None) == mesh])
        norms.append(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    _scale(gradients, torch.stack(norms).norm(), limit)


def _clip_over_stages(parameters: Iterable[nn.Parameter], tied: nn.Parameter, limit: float) -> None:
    own = list(parameters)
    counted = [p.grad for p in own if p.grad is not None and (p is not tied or dist.get_rank() == 0)]
    square = torch.nn.utils.get_total_norm(counted) ** 2
    dist.all_reduce(square)
    _scale([p.grad for p in own if p.grad is not None], square.sqrt(), limit)


def _scale(gradients: list[Tensor], norm: Tensor, limit: float) -> None:
    factor = torch.clamp(limit / (norm + 1e-6), max=1.0)
    torch._foreach_mul_([g.to_local() if isinstance(g, DTensor) else g for g in gradients], factor)
