"""Bytes of weights, gradients and optimizer state on each rank: estimated, measured, and by ZeRO's formula.

Activations are not in them: they depend on the batch, and `activation_checkpointing` and a smaller
`train.per_device_train_batch_size` are what makes those small.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from eagleray.config.layout import Layout
from eagleray.config.schema import TrainConfig
from eagleray.parallel.options import ParallelOptions
from eagleray.parallel.pipeline import cut_model, stage_numbers
from eagleray.parallel.plan import ParallelPlan
from eagleray.parallel.stage import prune
from eagleray.parallel.tensor import divided_parameters

FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes that a rank holds from step to step.

    Attributes:
        parameters: Of weights, trained or frozen.
        gradients: Of gradients, as large as the trained weights.
        optimizer: Of the optimizer's state.
    """

    parameters: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.parameters + self.gradients + self.optimizer


def state_tensors(train: TrainConfig) -> int:
    """Return how many tensors of a parameter's size the optimizer keeps for it."""
    if train.optim == "adamw":
        return 2
    return 1 if train.momentum else 0


def zero_footprint(num_trained: float, num_frozen: float, layout: Layout, num_states: int = 2) -> Footprint:
    """Return the formula of ZeRO's stage 3 in float32 (Rajbhandari et al. 2019, arXiv 1910.02054, section 5.3).

    Parameters, gradients and optimizer state are (4 + 4 + K) bytes times the trained parameters, with K = 8 for
    Adam; sharding divides all of it, and so does tensor parallelism; replicas divide nothing.

    Args:
        num_trained: Trained parameters of the model; of a pipeline those of the stage.
        num_frozen: Frozen ones, which have neither gradient nor state.
        layout: The degrees.
        num_states: Tensors of the optimizer for each trained parameter.
    """
    own = FLOAT32_BYTES / (layout.shard * layout.tensor)
    trained = round(num_trained * own)
    return Footprint(trained + round(num_frozen * own), trained, num_states * trained)


def estimate_footprints(
    model: nn.Module, layout: Layout, plan: ParallelPlan, options: ParallelOptions, num_states: int = 2
) -> list[Footprint]:
    """Return what the fullest rank of each place in the pipeline will hold; one without a pipeline.

    What tensor parallelism does not cut (norms, some biases) is counted whole, FSDP's parts with their padding,
    and a tied parameter on every stage that holds it.

    Args:
        model: The whole model; `meta` will do. It is not changed.
        layout: The degrees.
        plan: What the model tells about itself.
        options: How the layout is applied.
        num_states: Tensors of the optimizer for each trained parameter.

    Raises:
        ConfigError: The model cannot be cut into so many stages.
    """
    return [_footprint(held, layout, plan, num_states) for held in _held_by_ranks(model, layout, plan, options)]


def measure_footprint(parameters: Iterable[nn.Parameter], optimizer: Optimizer) -> Footprint:
    """Return the bytes of this rank's memory that is held after an update, before the next step."""
    held = list(parameters)
    states = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]
    return Footprint(
        storage_bytes(held), storage_bytes(p.grad for p in held if p.grad is not None), storage_bytes(states)
    )


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of all memory that tensors keep alive, once each; `meta` has none."""
    parts = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    storages: dict[int, Any] = {}
    for part in parts:
        if not part.is_meta:
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage()
    return sum(storage.nbytes() for storage in storages.values())


def _held_by_ranks(
    model: nn.Module, layout: Layout, plan: ParallelPlan, options: ParallelOptions
) -> list[list[nn.Module]]:
    """Return the stages of each rank of a pipeline, or the one model."""
    if layout.pipeline == 1:
        return [[model]]
    cut = cut_model(model, layout, plan, options)
    ranks = []
    for rank in range(layout.pipeline):
        stages = [copy.deepcopy(model) for _ in stage_numbers(options.schedule, rank, layout.pipeline)]
        for stage, number in zip(stages, stage_numbers(options.schedule, rank, layout.pipeline), strict=True):
            prune(stage, plan, cut[number])
        ranks.append(stages)
    return ranks


def _footprint(modules: Iterable[nn.Module], layout: Layout, plan: ParallelPlan, num_states: int) -> Footprint:
    trained: dict[str, int] = {}
    frozen: dict[str, int] = {}
    for module in modules:
        divided = divided_parameters(module, plan, layout.tensor)
        for name, parameter in module.named_parameters():  # a tied parameter of two stages of a rank is one
            held = trained if parameter.requires_grad else frozen
            held[name] = _local_bytes(parameter, divided.get(parameter), layout)
    weights = sum(trained.values())
    return Footprint(weights + sum(frozen.values()), weights, num_states * weights)


def _local_bytes(parameter: nn.Parameter, cut_dim: int | None, layout: Layout) -> int:
    shape = list(parameter.shape) or [1]
    if cut_dim is not None:
        shape[cut_dim] //= layout.tensor
    shape[0] = -(-shape[0] // layout.shard)  # FSDP cuts rows, and fills up the last part
    num_elements = 1
    for size in shape:
        num_elements *= size
    return num_elements * parameter.element_size()
