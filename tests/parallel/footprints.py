"""One update of a model in a layout, and the bytes that a rank holds after it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from families import TinyTask, build, fill_from_seed, global_batch

from eagleray.config.layout import Layout
from eagleray.config.schema import TrainConfig
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, apply_layout, apply_pipeline, build_mesh, data_coordinate
from eagleray.parallel.footprint import Footprint, estimate_footprints, measure_footprint, zero_footprint
from eagleray_jobs.train.optimizer import build_optimizer

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Held:
    """What a rank holds after an update.

    Attributes:
        measured: Bytes of the memory itself.
        estimated: What was known of this rank before there were ranks.
        formula: ZeRO's formula for the parameters of the model, or of this rank's stages.
    """

    measured: Footprint
    estimated: Footprint
    formula: Footprint


def update_once(family: str, layout: Layout, changes: Mapping[str, Any], options: ParallelOptions) -> Held:
    """Take one step with AdamW."""
    model = build(family, **changes)
    plan, mesh, fill = parallel_plan(model), build_mesh(layout, "cpu", timeout_s=15), fill_from_seed()
    estimates = estimate_footprints(model, layout, plan, options)
    where = data_coordinate(mesh)
    batch = {key: value.tensor_split(where.world)[where.rank] for key, value in global_batch(family, 0).items()}
    if layout.pipeline > 1:
        held = apply_pipeline(
            model, layout, mesh, CPU, plan=plan, options=options, loss=TinyTask().loss, fill=fill
        )
        held.run(batch, lambda total: total)
    else:
        held = model  # type: ignore[assignment]
        called = apply_layout(model, layout, mesh, CPU, plan=plan, options=options, fill=fill)
        torch.autograd.backward(TinyTask().loss(called, batch).total)
    optimizer = build_optimizer(held, TrainConfig(max_steps=1))
    optimizer.step()
    numbers = [sum(p.numel() for p in held.parameters() if p.requires_grad is kind) for kind in (True, False)]
    formula = zero_footprint(*numbers, layout)  # numel() of a tensor that is cut is that of the whole
    return Held(measure_footprint(held.parameters(), optimizer), estimates[mesh.get_local_rank("pp")], formula)
