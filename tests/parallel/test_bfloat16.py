"""bfloat16: weights and activations under FSDP, gradients and optimizer in float32; autocast elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import IGNORED, TinyTask, build, fill_from_seed, global_batch
from ranks import RankGroup
from runs import one_process
from torch import Tensor, nn
from training import Job, checkpoint_tensors, make_config, train

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, apply_layout, build_mesh, data_coordinate
from eagleray.parallel.gradients import whole_gradients

Groups = Callable[[int], RankGroup]
BF16 = ParallelOptions(bf16=True)


class SeenTypes:
    """What the Linears of the layers compute with."""

    def __init__(self, model: nn.Module) -> None:
        self.found: set[tuple[torch.dtype, torch.dtype, torch.dtype]] = set()
        for _, layer in parallel_plan(model).named_layers(model):
            for module in layer.modules():
                if isinstance(module, nn.Linear):
                    module.register_forward_hook(self._note)

    def _note(self, module: nn.Module, args: Any, output: Tensor) -> None:
        weight = module.weight
        assert isinstance(weight, Tensor)
        self.found.add((args[0].dtype, weight.dtype, output.dtype))


def one_step(family: str, layout: Layout) -> tuple[dict[str, Tensor], set[torch.dtype], set[Any], float]:
    """Return the gradients, the types of parameters, those of the computation, and the loss of this rank."""
    model = build(family)
    mesh = build_mesh(layout, "cpu", timeout_s=15)
    where = data_coordinate(mesh)
    cpu = torch.device("cpu")
    trained = apply_layout(
        model, layout, mesh, cpu, plan=parallel_plan(model), options=BF16, fill=fill_from_seed()
    )
    seen = SeenTypes(model)
    rows = global_batch(family, 0)
    batch = {name: value.tensor_split(where.world)[where.rank] for name, value in rows.items()}
    loss = TinyTask().loss(trained, batch)
    count = int((rows["labels"] != IGNORED).sum())
    (loss.total / count * where.world).backward()
    parameters = dict(model.named_parameters())
    types = {p.dtype for p in parameters.values()} | {
        p.grad.dtype for p in parameters.values() if p.grad is not None
    }
    return whole_gradients(parameters), types, seen.found, float(loss.total)


@pytest.mark.parametrize("family", ["marian", "t5", pytest.param("bert", marks=pytest.mark.slow)])
def test_fsdp_computes_in_bfloat16_and_keeps_float32(group: Groups, family: str) -> None:
    gradients, types, seen, _ = group(2).run(one_step, family, Layout(shard=2))[0]
    assert types == {torch.float32}
    assert seen == {(torch.bfloat16, torch.bfloat16, torch.bfloat16)}
    expected = one_process(family).gradients
    assert gradients.keys() == expected.keys()
    scale = max(float(value.norm()) for value in expected.values())
    errors = {
        name: float((gradients[name] - value).norm()) / max(float(value.norm()), 1e-2 * scale)
        for name, value in expected.items()
    }
    # bfloat16 has 8 bits: an error of zero would mean that it was not used.
    assert 1e-4 < max(errors.values()) < 0.1, errors


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"data_parallel_shard_degree": 2},
    "tp2": {"tensor_parallel_degree": 2},
    "pp2": {"pipeline_parallel_degree": 2},
}


@pytest.mark.parametrize("layout", ["fsdp2", "pp2", pytest.param("tp2", marks=pytest.mark.slow)])
def test_a_run_in_bfloat16_is_close_to_float32_and_stores_float32(
    group: Groups, tmp_path: Path, layout: str
) -> None:
    keys = {"max_steps": 4, "save_steps": 4}
    one = group(1).run(train, Job(make_config(**keys), str(tmp_path / "one")))[0]
    folder = str(tmp_path / "cut")
    cut = group(2).run(train, Job(make_config(layout=LAYOUTS[layout], bf16=True, **keys), folder))[0]
    assert cut.losses == pytest.approx(one.losses, rel=5e-3)
    assert cut.losses != one.losses
    stored = checkpoint_tensors(folder, 4)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float32}
    assert any(name.startswith("optim.") for name in stored)


def test_offloading_to_the_host_is_refused_where_there_is_no_gpu(group: Groups) -> None:
    message = group(2).run(offloaded)[0]
    assert "parallel.cpu_offload needs GPUs, but the workers compute on cpu" in message


def offloaded() -> str:
    layout, model = Layout(shard=2), build("bert")
    mesh = build_mesh(layout, "cpu", timeout_s=15)
    with pytest.raises(ConfigError) as error:
        apply_layout(model, layout, mesh, torch.device("cpu"), options=ParallelOptions(cpu_offload=True))
    return str(error.value)
