"""FSDP's offload keeps weights, gradients and optimizer state on the host."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from eagleray.config.layout import Layout
from eagleray.config.schema import TrainConfig
from eagleray.parallel import ParallelOptions, build_mesh
from eagleray.parallel.gradients import gradient_norm
from eagleray.parallel.shard import Sharding
from eagleray_jobs.train.optimizer import build_optimizer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture
def one_rank(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def test_a_step_leaves_everything_on_the_host(one_rank: None) -> None:
    layout = Layout()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1))
    expected = [parameter.detach().clone() for parameter in model.parameters()]
    model.cuda()
    sharding = Sharding(layout, build_mesh(layout, "cuda"), ParallelOptions(cpu_offload=True))
    sharding.wrap_layer(model[0])
    sharding.wrap_root(model)
    optimizer = build_optimizer(model, TrainConfig(max_steps=1, learning_rate=0.1))
    loss = model(torch.ones(4, 8, device="cuda")).sum()
    assert loss.device.type == "cuda"
    loss.backward()
    assert float(gradient_norm(model.parameters())) > 0
    optimizer.step()
    held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    held += [state["exp_avg"] for state in optimizer.state.values()]
    assert {tensor.device.type for tensor in held} == {"cpu"} and len(held) == 12
    assert not all(torch.equal(p.full_tensor(), old) for p, old in zip(model.parameters(), expected, strict=True))  # type: ignore[attr-defined]
