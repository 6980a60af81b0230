"""Gradients that replicas of one host add up in memory of all of them."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import RankGroup, RankGroups, RanksFailed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from eagleray.config.layout import Layout
from eagleray.parallel import apply_layout, build_mesh, shared_memory
from eagleray.parallel.shared_memory import share_memory

WIDTH = 30
NUM_STEPS = 5


def model_of(dtype: torch.dtype, num_layers: int = 4) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(num_layers)))


def gradients_of(model: nn.Module, replicated: nn.Module, dtype: torch.dtype) -> list[list[Tensor]]:
    """The gradients of a few steps, in which every rank computes rows of its own."""
    found = []
    for step in range(NUM_STEPS):
        torch.manual_seed(100 * step + dist.get_rank())
        model.zero_grad()
        with replicated.no_sync():
            replicated(torch.randn(7, WIDTH, dtype=dtype)).square().sum().backward()
        replicated(torch.randn(3, WIDTH, dtype=dtype)).square().sum().backward()
        found.append([parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None])
    return found


def differences(dtype: torch.dtype, bucket_bytes: int) -> list[float]:
    """Train in shared memory and through gloo; the largest relative difference of each step."""
    group = dist.group.WORLD
    assert group is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shared_memory, "BUCKET_BYTES", bucket_bytes)
        model = model_of(dtype)
        memory = share_memory(model, group)
        assert memory is not None
        cap_mb = bucket_bytes / 2**20
        replicated = DistributedDataParallel(model, bucket_cap_mb=cap_mb, gradient_as_bucket_view=True)
        replicated.register_comm_hook(None, memory.exchange)
        ours = gradients_of(model, replicated, dtype)
    model = model_of(dtype)
    theirs = gradients_of(model, DistributedDataParallel(model), dtype)
    return [
        max(float((mine - other).abs().max() / other.abs().max()) for mine, other in zip(*pair, strict=True))
        for pair in zip(ours, theirs, strict=True)
    ]


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("dtype, bar", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float64, 1e-14)])
@pytest.mark.parametrize("bucket_bytes", [32 * 2**20, 5000])
def test_gradients_are_those_of_gloo(
    group: Callable[[int], RankGroup], world: int, dtype: torch.dtype, bar: float, bucket_bytes: int
) -> None:
    for found in group(world).run(differences, dtype, bucket_bytes):
        assert max(found) <= bar


def averages(sizes: list[int]) -> tuple[list[list[float]], list[list[float]]]:
    """Average tensors of many sizes one after the other, with ranks that come late by turns."""
    group = dist.group.WORLD
    assert group is not None
    memory = share_memory(nn.Linear(max(sizes), 1), group)
    assert memory is not None
    rank, world = dist.get_rank(), dist.get_world_size()
    found, expected = [], []
    for number, size in enumerate(sizes):
        values = torch.arange(size, dtype=torch.float32) + 1000 * rank + number
        if number % world == rank:
            torch.randn(300, 300).matmul(torch.randn(300, 300))
        memory.average(values)
        found.append(values.tolist())
        expected.append((torch.arange(size) + 1000 * (world - 1) / 2 + number).tolist())
    return found, expected


def test_no_exchange_reads_what_the_next_one_writes(group: Callable[[int], RankGroup]) -> None:
    sizes = [1, 2, 3, 64, 1000, 5] * 40
    for found, expected in group(3).run(averages, sizes):
        assert found == expected


def leftovers() -> tuple[int, int, list[str]]:
    """Descriptors of memory that is in use and of memory that is not, and files in the folder of shared memory."""
    group = dist.group.WORLD
    assert group is not None
    gc.collect()  # what other tests have left in this process
    memory = share_memory(model_of(torch.float32), group)
    assert memory is not None
    used = num_descriptors()
    del memory
    gc.collect()
    return used, num_descriptors(), [path.name for path in Path("/dev/shm").iterdir() if "eagleray" in path.name]


def num_descriptors() -> int:
    paths = [os.path.realpath(path) for path in Path("/proc/self/fd").iterdir()]
    return sum("eagleray-gradients" in path for path in paths)


def test_memory_goes_with_the_model(group: Callable[[int], RankGroup]) -> None:
    assert group(2).run(leftovers) == [(1, 0, [])] * 2


def shares_when(what: str) -> tuple[type, int]:
    """What a layout wraps a model in, and how many hooks it has, where one rank may not see the memory."""
    with pytest.MonkeyPatch.context() as patch:
        if dist.get_rank() == 1:
            if what == "one host":
                pass
            elif what == "another host":
                patch.setattr(socket, "gethostname", lambda: "elsewhere")
            else:  # in another container the same path leads to memory of other processes
                joins = shared_memory._map
                other = bytes(16)
                patch.setattr(
                    shared_memory, "_map", lambda opened, offer: joins(opened, offer._replace(token=other))
                )
        layout = Layout(replicate=dist.get_world_size())
        replicated = apply_layout(model_of(torch.float32), layout, build_mesh(layout, "cpu"), torch.device("cpu"))
        gradients_of(replicated.module, replicated, torch.float32)
        return type(replicated), len(replicated._comm_hooks)


@pytest.mark.parametrize("what, num_hooks", [("one host", 1), ("another host", 0), ("another process", 0)])
def test_a_layout_shares_memory_where_all_ranks_see_it_and_uses_sockets_elsewhere(
    group: Callable[[int], RankGroup], what: str, num_hooks: int
) -> None:
    assert group(2).run(shares_when, what) == [(DistributedDataParallel, num_hooks)] * 2


def ends_in_an_exchange(told: str) -> None:
    """End one rank between two exchanges, and write down what the other is told."""
    group = dist.group.WORLD
    assert group is not None
    memory = share_memory(nn.Linear(100, 1), group)
    assert memory is not None
    memory.average(torch.ones(100))
    if dist.get_rank() == 1:
        os._exit(1)
    try:
        memory.average(torch.ones(100))
    except RuntimeError as error:
        Path(told).write_text(str(error))


def test_a_rank_that_ends_fails_the_exchange_of_the_others(tmp_path: Path) -> None:
    with RankGroups() as groups, pytest.raises(RanksFailed, match="rank 1"):
        groups(2).run(ends_in_an_exchange, str(tmp_path / "told"))
    assert "gloo" in (tmp_path / "told").read_text()


def shares_sparse() -> bool:
    group = dist.group.WORLD
    assert group is not None
    return share_memory(nn.Embedding(10, 4, sparse=True), group) is not None


def test_sparse_gradients_go_through_sockets(group: Callable[[int], RankGroup]) -> None:
    assert group(2).run(shares_sparse) == [False, False]
