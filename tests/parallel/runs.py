"""A few steps in a layout, and what they gave, to compare with one process."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from families import IGNORED, TinyTask, build, build_whole, fill_from_seed, global_batch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from eagleray.config.layout import Layout
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, apply_layout, apply_pipeline, build_mesh, data_coordinate
from eagleray.parallel.gradients import gradient_norm, local_gradients, whole, whole_gradients

CPU = torch.device("cpu")


@dataclass
class Result:
    """What a few steps gave."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]
    initial: dict[str, Tensor]


def one_process(family: str, steps: int = 3, **changes: Any) -> Result:
    model = build_whole(family, **changes)
    initial = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    result = Result([], [], {}, {}, initial)
    for step in range(steps):
        batch = global_batch(family, step)
        loss = TinyTask().loss(model, batch)
        (loss.total / loss.count).backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        result.gradients = result.gradients or gradients
        result.losses.append(float(loss.total.detach() / loss.count))
        result.norms.append(float(torch.stack([g.norm() for g in gradients.values()]).norm()))
        optimizer.step()
        optimizer.zero_grad()
    result.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return result


def in_layout(
    family: str, layout: Layout, options: ParallelOptions, steps: int = 3, changes: dict[str, Any] | None = None
) -> Result | None:
    """Run on every rank; rank 0 returns the result."""
    model = build(family, **changes or {})
    mesh = build_mesh(layout, "cpu", timeout_s=15)
    where = data_coordinate(mesh)
    if layout.pipeline > 1:
        return in_pipeline(family, layout, options, steps, model, mesh)
    trained = apply_layout(
        model, layout, mesh, CPU, plan=parallel_plan(model), options=options, fill=fill_from_seed()
    )
    parameters = dict(model.named_parameters())
    initial = {name: whole(p) for name, p in parameters.items()}
    groups = [
        [p for p in parameters.values() if p.requires_grad and type(p.data) is kind]
        for kind in {type(p.data) for p in parameters.values()}
    ]
    optimizers = [torch.optim.SGD(group, lr=0.1) for group in groups if group]
    result = Result([], [], {}, {}, initial)
    for step in range(steps):
        batch = {
            name: value.tensor_split(where.world)[where.rank] for name, value in global_batch(family, step).items()
        }
        labels = global_batch(family, step)["labels"]
        count = int((labels != IGNORED).sum())
        loss = TinyTask().loss(trained, batch)
        (loss.total / count * where.world).backward()
        total = loss.total.detach() * where.counts
        dist.all_reduce(total)
        result.losses.append(float(total) / count)
        result.norms.append(float(gradient_norm(parameters.values())))
        result.gradients = result.gradients or whole_gradients(parameters)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert local_gradients(parameters.values()) == []
    result.parameters = {name: whole(p) for name, p in parameters.items()}
    return result if dist.get_rank() == 0 else None


def in_pipeline(
    family: str, layout: Layout, options: ParallelOptions, steps: int, model: nn.Module, mesh: DeviceMesh
) -> Result | None:
    where, group = data_coordinate(mesh), mesh.get_group("pp")
    plan = parallel_plan(model)
    fill, loss = fill_from_seed(), TinyTask().loss
    pipeline = apply_pipeline(model, layout, mesh, CPU, plan=plan, options=options, loss=loss, fill=fill)
    parameters = dict(pipeline.named_parameters())
    initial = gathered_over({name: whole(p) for name, p in parameters.items()}, group)
    kinds: dict[object, list[nn.Parameter]] = {}
    for p in parameters.values():
        if p.requires_grad:
            kinds.setdefault(getattr(p, "device_mesh", None), []).append(p)
    optimizers = [torch.optim.SGD(members, lr=0.1) for members in kinds.values()]
    result = Result([], [], {}, {}, initial)
    for step in range(steps):
        rows = global_batch(family, step)
        batch = {name: value.tensor_split(where.world)[where.rank] for name, value in rows.items()}
        count = int((rows["labels"] != IGNORED).sum())
        losses = pipeline.run(batch, partial(scaled, factor=where.world / count))
        total = torch.stack([*losses.totals, torch.zeros(())]).sum() * (mesh.get_local_rank("tp") == 0)
        dist.all_reduce(total)
        result.losses.append(float(total) / count)
        assert sum(int(c) for c in losses.counts) == (
            int((batch["labels"] != IGNORED).sum()) if losses.counts else 0
        )
        result.norms.append(float(gradient_norm(pipeline.counted_parameters(), group)))
        result.gradients = result.gradients or gathered_over(whole_gradients(parameters), group)
        for optimizer in optimizers:
            optimizer.step()
        pipeline.zero_grad()
    result.parameters = gathered_over({name: whole(p) for name, p in parameters.items()}, group)
    return result if dist.get_rank() == 0 else None


def scaled(total: Tensor, factor: float) -> Tensor:
    return total * factor


def gathered_over(tensors: dict[str, Tensor], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """Put together what the stages hold; copies of a tied tensor must be equal."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(group.size())]
    dist.all_gather_object(parts, tensors, group=group)
    found: dict[str, Tensor] = {}
    for name, value in (item for part in parts for item in part.items()):
        assert torch.equal(found.setdefault(name, value), value), f"the copies of {name} differ"
    return found


def assert_same(found: Result, expected: Result) -> None:
    """Compare to float32's accuracy, tensor by tensor."""
    assert found.initial.keys() == expected.initial.keys()
    for name, value in expected.initial.items():
        assert torch.equal(found.initial[name], value), f"the initial {name} differs"
    assert found.gradients.keys() == expected.gradients.keys()
    scale = max(float(value.norm()) for value in expected.gradients.values())
    for name, value in expected.gradients.items():
        error = float((found.gradients[name] - value).norm()) / max(float(value.norm()), 1e-3 * scale)
        assert error < 1e-5, f"the gradient of {name} differs by {error:.1e}"
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-6, atol=0)
    torch.testing.assert_close(found.parameters, expected.parameters, rtol=1e-5, atol=1e-6)
