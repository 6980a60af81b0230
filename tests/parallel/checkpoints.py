"""What the ranks of the store's tests do; module-level functions, sent by their import path."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import CheckpointDamagedError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import CheckpointSaver, SaveResult

NAME = "m"
SHAPES = {
    "model.sharded.weight": (7, 5),
    "model.columns.weight": (4, 6),
    "model.replicated.weight": (6, 3),
    "model.tiny.weight": (1, 2),
    "optim.sharded.weight.exp_avg": (7, 5),
    "optim.sharded.weight.step": (),
}
PLACEMENTS: dict[str, Placement] = {
    "model.sharded.weight": Shard(0),
    "model.columns.weight": Shard(1),
    "model.tiny.weight": Shard(0),
    "optim.sharded.weight.exp_avg": Shard(0),
}


def config(**train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": NAME,
            "task": "translation",
            "model": {"family": "marian"},
            "data": {"source": "cldr-en-fr"},
            "train": {"max_steps": 10, **train},
        }
    )


def owned_run(store: ObjectStore, attempt: str = "a") -> RunHandle:
    """A run that somebody owns: taken here if it is new."""
    if not store.exists(epoch_key(NAME, 1, 1)):
        create_record(store, epoch_key(NAME, 1, 1), {"owner": {"host": "here", "pid": 1}})
    return RunHandle(store, NAME, run=1, epoch=1, attempt=attempt)


def whole_tensors() -> dict[str, torch.Tensor]:
    """The same values in every process; no two tensors alike."""
    tensors = {}
    for name, shape in SHAPES.items():
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
        tensors[name] = torch.rand(shape, generator=torch.Generator().manual_seed(seed))
    tensors["model.columns.weight"] = tensors["model.columns.weight"].bfloat16()
    return tensors


def laid_out(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Cut tensors over all ranks, uneven and empty parts included; the others are replicated."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    cut = {}
    for name, tensor in tensors.items():
        placement = PLACEMENTS.get(name)
        cut[name] = tensor if placement is None else distribute_tensor(tensor, mesh, [placement])
    return cut


def laid_out_in_two_dimensions(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Four ranks: replicated over two, cut over two, as HSDP does."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    cut = {}
    for name, tensor in tensors.items():
        placement = PLACEMENTS.get(name, Replicate())
        cut[name] = distribute_tensor(tensor, mesh, [Replicate(), placement])
    return cut


def save(location: str, step: int, in_two_dimensions: bool = False) -> list[SaveResult]:
    """Save the tensors and change them at once, as a training would."""
    store = ObjectStore.open(location)
    run = owned_run(store) if dist.get_rank() == 0 else RunHandle(store, NAME, 1, 1, "a")
    dist.barrier()
    cut = (laid_out_in_two_dimensions if in_two_dimensions else laid_out)(whole_tensors())
    saver = CheckpointSaver(None, run, layout=Layout(shard=dist.get_world_size()), config=config(), timeout_s=20)
    saver.save(step=step, tensors=cut, files={"config.json": b"{}"}, state={"step": step}, metrics={"loss": 0.5})
    for tensor in cut.values():
        tensor.zero_()
    results = saver.wait()
    saver.close()
    return results


def load(location: str, version: str) -> tuple[bool, int]:
    """Load the version in this world's layout; whether all of it is right, and the bytes this rank read."""
    checkpoint = Checkpoint.open(ObjectStore.open(location), NAME, version)
    whole = whole_tensors()
    cut = laid_out({name: torch.full_like(tensor, -1) for name, tensor in whole.items()})
    num_bytes = checkpoint.load_into(cut)
    expected = laid_out(whole)
    return all(torch.equal(_local(cut[name]), _local(expected[name])) for name in whole), num_bytes


LARGE = {f"model.layers.{number}.weight": (512, 256) for number in range(4)}


def save_large(location: str, placements: Sequence[Placement]) -> None:
    """Save matrices of half a MiB, cut over all ranks."""
    store = ObjectStore.open(location)
    run = owned_run(store) if dist.get_rank() == 0 else RunHandle(store, NAME, 1, 1, "a")
    dist.barrier()
    saver = CheckpointSaver(None, run, layout=Layout(shard=dist.get_world_size()), config=config(), timeout_s=20)
    saver.save(step=1, tensors=large_tensors(placements), files={}, state={}, metrics={})
    assert [result.error for result in saver.wait()] == [None]
    saver.close()


def load_large(location: str, mesh_shape: tuple[int, ...], placements: Sequence[Placement]) -> float:
    """Load them cut otherwise; check the values and return the share of all bytes that this rank read."""
    checkpoint = Checkpoint.open(ObjectStore.open(location), NAME, "r1-step-00000001")
    expected = large_tensors(placements, mesh_shape)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    num_bytes = checkpoint.load_into(loaded)
    assert all(torch.equal(_local(loaded[name]), _local(expected[name])) for name in expected)
    return num_bytes / sum(4 * rows * columns for rows, columns in LARGE.values())


def load_damaged(location: str) -> str:
    """Load by halves of the rows what is damaged in its last byte; return the message."""
    try:
        load_large(location, (2,), [Shard(0)])
    except CheckpointDamagedError as error:
        return error.message
    return "nothing"


def large_tensors(
    placements: Sequence[Placement], mesh_shape: tuple[int, ...] | None = None
) -> dict[str, torch.Tensor]:
    mesh = init_device_mesh("cpu", mesh_shape or (dist.get_world_size(),))
    whole = {
        name: torch.rand(shape, generator=torch.Generator().manual_seed(number))
        for number, (name, shape) in enumerate(LARGE.items())
    }
    return {name: distribute_tensor(tensor, mesh, placements) for name, tensor in whole.items()}


def _local(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
