"""A model on `meta`, cut and filled on every rank, and the bytes that it took."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import TinyTask, build, build_whole, fill_from_seed
from tensor_memory import PeakTensorBytes, storage_bytes
from torch import Tensor, nn
from training import processor_of

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_unfilled
from eagleray.models.plans import parallel_plan
from eagleray.models.sources import ModelInMemory, fill_from
from eagleray.parallel import Fill, ParallelOptions, Pipeline, apply_layout, apply_pipeline, build_mesh
from eagleray.parallel.gradients import whole
from eagleray.parallel.local import Box

CPU = torch.device("cpu")


@dataclass
class Filled:
    """What a rank has of a model.

    Attributes:
        weights: Whole parameters, of this rank's stages.
        held: Bytes of its parts of all parameters and buffers.
        peak: Most bytes of tensors alive together while it was filled.
    """

    weights: dict[str, Tensor]
    held: int
    peak: int


@dataclass
class Counting:
    """A source that counts what it is asked for."""

    source: ModelInMemory
    num_bytes: int = 0

    def holds(self, name: str) -> bool:
        return self.source.holds(name)

    def read(self, name: str, box: Box) -> Tensor:
        part = self.source.read(name, box)
        self.num_bytes += part.nbytes
        return part


def fill_family(family: str, layout: Layout, changes: dict[str, Any]) -> Filled:
    """Fill a family's model with initial weights."""
    return filled(build(family, **changes), fill_from_seed(), layout)


def fill_file(config: RunConfig, layout: Layout) -> Filled:
    """Fill the model of a file."""
    model, fill = build_unfilled(config, processor_of(config.task))
    assert fill is not None
    return filled(model, fill, layout)


def read_from_source(family: str, layout: Layout, changes: dict[str, Any]) -> tuple[int, int]:
    """Fill a model from another one; return the bytes that were read and those that are held."""
    source = Counting(ModelInMemory(build_whole(family, **changes)))
    found = filled(build(family, **changes), partial(fill_from, source), layout)
    return source.num_bytes, found.held


def filled(model: nn.Module, fill: Fill, layout: Layout) -> Filled:
    mesh, plan, options = build_mesh(layout, "cpu", timeout_s=15), parallel_plan(model), ParallelOptions()
    with PeakTensorBytes() as memory:
        if layout.pipeline > 1:
            held: nn.Module = apply_pipeline(
                model, layout, mesh, CPU, plan=plan, options=options, loss=TinyTask().loss, fill=fill
            )
        else:
            apply_layout(model, layout, mesh, CPU, plan=plan, options=options, fill=fill)
            held = model
    tensors = [*held.parameters(), *held.buffers()]
    weights = {name: whole(parameter) for name, parameter in held.named_parameters()}
    return Filled(weights, storage_bytes(tensors), memory.peak)


def gather_for_evaluation(family: str, layout: Layout) -> tuple[bool, int, int]:
    """Gather a pipeline's model; whether it is the whole one, and tensor bytes held before and after."""
    model, expected = build(family), build_whole(family)
    mesh, plan = build_mesh(layout, "cpu", timeout_s=15), parallel_plan(model)
    pipeline: Pipeline = apply_pipeline(
        model,
        layout,
        mesh,
        CPU,
        plan=plan,
        options=ParallelOptions(),
        loss=TinyTask().loss,
        fill=fill_from_seed(),
    )
    with pipeline.gathered() as copy:
        own, other = copy.state_dict(), expected.state_dict()
        same = own.keys() == other.keys() and all(torch.equal(own[name], other[name]) for name in own)
        same &= all(torch.equal(b, dict(expected.named_buffers())[name]) for name, b in copy.named_buffers())
        whole_bytes = storage_bytes([*copy.parameters(), *copy.buffers()])
    dist.barrier()
    return same, whole_bytes, storage_bytes([*pipeline.parameters(), *pipeline.buffers()])


def save_bert(directory: Path, num_labels: int, dtype: torch.dtype = torch.float32, base: bool = False) -> None:
    """Write a checkpoint as Hugging Face does, in several files."""
    import transformers

    torch.manual_seed(3)
    config = transformers.BertConfig(
        vocab_size=300, hidden_size=16, num_hidden_layers=4, num_attention_heads=4, intermediate_size=24,
        max_position_embeddings=128, num_labels=num_labels,
    )  # fmt: skip
    model = (transformers.BertModel if base else transformers.BertForSequenceClassification)(config)
    model.to(dtype).save_pretrained(directory, max_shard_size="20KB")
