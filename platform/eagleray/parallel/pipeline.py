"""Pipeline parallelism: stages of layers on the ranks of the axis `pp`, run by torch's schedules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from eagleray.config.cutting import micro_batches
from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel.cut import cut_layers, estimate_costs
from eagleray.parallel.gradients import whole
from eagleray.parallel.local import local, materialize
from eagleray.parallel.mesh import group_over_stages
from eagleray.parallel.options import ParallelOptions, Schedule
from eagleray.parallel.plan import ParallelPlan
from eagleray.parallel.stage import LossFunction, Stage, capture_inputs, prune
from eagleray.parallel.timeline import Timeline

Shape = tuple[int, ...]
ScaleLoss = Callable[[Tensor], Tensor]
Holders = dict[str, list[int]]

_STAGES_PER_RANK = {"GPipe": 1, "1F1B": 1, "Interleaved1F1B": 2, "InterleavedZeroBubble": 2, "ZBVZeroBubble": 2}


@dataclass(frozen=True, slots=True)
class PipelineLoss:
    """Losses of the micro-batches, on ranks that hold the last stage; elsewhere both are empty.

    Attributes:
        totals: Summed loss of each micro-batch, detached, shape ().
        counts: Number of items in each, shape ().
    """

    totals: list[Tensor]
    counts: list[Tensor]


def stage_numbers(schedule: str, rank: int, num_ranks: int) -> list[int]:
    """Return the stages of a rank: one, two in rounds, or two as a V (Qi et al. 2023, arXiv 2401.10241)."""
    if _STAGES_PER_RANK[schedule] == 1:
        return [rank]
    if schedule == "ZBVZeroBubble":
        return [rank, 2 * num_ranks - 1 - rank]
    return [rank, rank + num_ranks]


def cut_model(model: nn.Module, layout: Layout, plan: ParallelPlan, options: ParallelOptions) -> list[range]:
    """Return the layers of each stage.

    Raises:
        ConfigError: The model cannot be cut into so many stages.
    """
    if plan.pipeline is None:
        raise ConfigError(
            f"parallel.pipeline_parallel_degree is {layout.pipeline}, but {type(model).__name__} does not say how "
            "it can be cut into stages",
            "set it to 1, or give the module's parallel_plan a `pipeline`",
        )
    if options.schedule.endswith("ZeroBubble") and len(plan.layers) > 1:
        raise ConfigError(
            f"parallel.pipeline_parallel_schedule {options.schedule} cannot run {type(model).__name__}: it splits "
            "the backward pass, which torch cannot do through an encoder's result that several layers read",
            "use 1F1B, Interleaved1F1B or GPipe",
        )
    num_stages = layout.pipeline * _STAGES_PER_RANK[options.schedule]
    return cut_layers(estimate_costs(model, plan, options.length), num_stages, options.split)


def check_sharded_stages(
    model: nn.Module, plan: ParallelPlan, cut: list[range], schedule: Schedule, num_ranks: int
) -> None:
    """Refuse what FSDP cannot do in a pipeline.

    It owns the memory of each stage, so two stages of a rank cannot share a parameter; and it loses gradients
    when the backward pass is split into inputs and weights.

    Args:
        model: The whole model; `meta` will do.
        plan: What it tells about itself.
        cut: The layers of each stage, from `cut_model`.
        schedule: The pipeline's.
        num_ranks: Ranks of a pipeline.

    Raises:
        ConfigError: The schedule splits the backward pass, or ties two stages of any rank.
    """
    if schedule.endswith("ZeroBubble"):
        raise ConfigError(
            f"parallel.pipeline_parallel_schedule {schedule} does not work beside data-parallel "
            "degrees: FSDP loses gradients when the backward pass is split",
            "use 1F1B, Interleaved1F1B or GPipe, or tensor parallelism instead",
        )
    holders, _ = _holders_of(model, plan, cut)
    for rank in range(num_ranks):
        numbers = stage_numbers(schedule, rank, num_ranks)
        shared = [name for name, held in holders.items() if len(set(held) & set(numbers)) > 1]
        if shared:
            raise ConfigError(
                f"schedule {schedule} puts {shared[0]}, which is tied, into two stages of rank "
                f"{rank}, and data-parallel degrees beside a pipeline cannot hold it there",
                "use schedule 1F1B or GPipe, another pipeline_parallel_split, or untie the embeddings",
            )


class Pipeline(nn.Module):
    """The stages of this rank, and how a batch runs through all stages.

    As a module it has the parameters, buffers and state of its stages under the names of the whole model.

    Args:
        model: The whole model, on `meta`; it is copied and not changed.
        layout: The degrees.
        mesh: All workers.
        device: Where this rank computes.
        plan: What the model tells about itself.
        options: Schedule, number of micro-batches and split.
        loss: The task's loss.

    Attributes:
        timeline: Records the passes of the stages; set before the first batch.

    Raises:
        ConfigError: The model cannot be cut into so many stages.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        mesh: DeviceMesh,
        device: torch.device,
        *,
        plan: ParallelPlan,
        options: ParallelOptions,
        loss: LossFunction,
    ) -> None:
        super().__init__()
        self.timeline = Timeline()
        self.cut = cut_model(model, layout, plan, options)
        self._group = mesh.get_group("pp")
        self._device, self._options, self._loss = device, options, loss
        self.num_micro_batches = micro_batches(layout, options.num_microbatches)
        self.numbers = stage_numbers(options.schedule, self._group.rank(), layout.pipeline)
        self.stages = nn.ModuleList(
            Stage(copy.deepcopy(model), plan, self.cut[number], loss) for number in self.numbers
        )
        self._skeleton = partial(copy.deepcopy, model)
        self._holders, self._buffer_holders = _holders_of(model, plan, self.cut)
        self._sizes = [len(plan.layer_list(model, name)) for name in plan.layers]
        assert plan.pipeline is not None
        self._shapes = plan.pipeline(copy.deepcopy(model))
        self._tied_groups = self._groups_of_tied(mesh, options.schedule)
        self._prepared: dict[tuple[Shape, ...], Any] = {}
        self._totals: list[Tensor] = []

    @property
    def holds_last(self) -> bool:
        """Whether this rank computes the loss."""
        return any(stage.is_last for stage in self.own_stages())

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield parameters under their names in the whole model, once each."""
        yield from _once(stage.module.named_parameters(prefix, recurse, True) for stage in self.own_stages())

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield buffers under their names in the whole model, once each."""
        yield from _once(stage.module.named_buffers(prefix, recurse, True) for stage in self.own_stages())

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """Return the state of the stages under the names of the whole model."""
        return {
            name: value
            for stage in self.own_stages()
            for name, value in stage.module.state_dict(*args, **kwargs).items()
        }

    @property
    def group(self) -> dist.ProcessGroup:
        """The ranks of this pipeline, in the order of their stages."""
        return self._group

    @contextmanager
    def gathered(self) -> Iterator[nn.Module]:
        """Hold the whole model on every rank as long as the context lasts, to call it; entered by all together.

        Its weights are a copy of those of the stages; only the structure of the model is kept all the time.

        Raises:
            ConfigError: No stage holds a buffer of the model, so that nobody knows its values.
        """
        model = self._skeleton()
        materialize(model, self._device)
        self._copy_into(model)
        yield model

    @torch.no_grad()
    def _copy_into(self, model: nn.Module) -> None:
        size = self._group.size()
        owner = {n: rank for rank in range(size) for n in stage_numbers(self._options.schedule, rank, size)}
        own: dict[str, Tensor] = dict(self.named_parameters())
        for stage in self.own_stages():
            own |= dict(stage.module.named_buffers(remove_duplicate=False))
        for name, target in [*model.named_parameters(), *model.named_buffers()]:
            if name not in self._holders and name not in self._buffer_holders:
                raise ConfigError(f"no stage of the pipeline holds the buffer {name}", "register it in a layer")
            rank = owner[(self._holders.get(name) or self._buffer_holders[name])[0]]
            if rank == self._group.rank():
                target.copy_(whole(own[name]))
            dist.broadcast(target.detach(), group=self._group, group_src=rank)

    def share_copies(self) -> None:
        """Let a tied parameter of two stages of this rank be one object; called once they are filled."""
        shared: dict[nn.Parameter, nn.Parameter] = {}
        first: dict[str, nn.Parameter] = {}
        for stage in self.own_stages():
            for name, parameter in stage.module.named_parameters():
                shared[parameter] = first.setdefault(name, parameter)
            for module in stage.module.modules():
                for key, parameter in list(module.named_parameters(recurse=False)):
                    if shared[parameter] is not parameter:
                        module.register_parameter(key, shared[parameter])

    def run(self, batch: dict[str, Tensor], scale_loss: ScaleLoss) -> PipelineLoss:
        """Run forward and backward passes of a batch; gradients are added to those of the parameters.

        Args:
            batch: Rows of this data-parallel rank, on the device; the same on all ranks of the pipeline. Dim 0 is
                cut into micro-batches.
            scale_loss: What the summed loss of a micro-batch is turned into before its backward pass.
        """
        rows = next(iter(batch.values())).shape[0]
        if rows % self.num_micro_batches:
            raise ConfigError(
                f"a data-parallel rank has {rows} rows of the global batch, which do not make "
                f"{self.num_micro_batches} equal micro-batches",
                "change train.global_batch_size or parallel.num_microbatches",
            )
        for stage in self.own_stages():
            stage.counts.clear()
        losses: list[Tensor] = []
        schedule = self._schedule(batch, rows, scale_loss)
        entry = torch.zeros(rows, device=self._device)
        # Every rank hands the batch over; only activations travel.
        target = entry if self.holds_last else None
        schedule.step(entry, target=target, losses=losses, return_outputs=False, **batch)
        self._sum_tied()
        last = next((stage for stage in self.own_stages() if stage.is_last), None)
        return PipelineLoss(self._totals, last.counts[-self.num_micro_batches :] if last else [])

    def _schedule(self, batch: dict[str, Tensor], rows: int, scale_loss: ScaleLoss) -> Any:
        """Return a schedule for these shapes: receive buffers are made once for each."""
        self._totals = []
        self._scale_loss = scale_loss
        key = tuple(tuple(value.shape) for value in batch.values())
        if key not in self._prepared:
            if len(self._prepared) >= 16:
                self._prepared.pop(next(iter(self._prepared)))
            self._prepared[key] = self._prepare(batch, rows // self.num_micro_batches)
        return self._prepared[key]

    def _prepare(self, batch: dict[str, Tensor], rows: int) -> Any:
        # Not at the top: it brings torch.compile along, and every other layout does without.
        from torch.distributed.pipelining.schedules import get_schedule_class

        from eagleray.parallel.timed_stage import TimedStage

        inputs = capture_inputs(self._loss, {name: value[:rows] for name, value in batch.items()})
        stages = []
        for number, stage in zip(self.numbers, self.own_stages(), strict=True):
            before = self._stream(number - 1, rows, inputs)
            after = self._stream(number, rows, inputs)
            stages.append(
                TimedStage(
                    stage,
                    number,
                    len(self.cut),
                    self._device,
                    input_args=before,
                    output_args=after,
                    group=self._group,
                    timeline=self.timeline,
                )
            )
        schedule_class = get_schedule_class(self._options.schedule)
        return schedule_class(
            stages if len(stages) > 1 else stages[0],
            self.num_micro_batches,
            loss_fn=self._micro_batch_loss,
            scale_grads=False,
        )

    def _micro_batch_loss(self, output: Tensor, target: Tensor) -> Tensor:
        total = output.sum()
        self._totals.append(total.detach())
        return self._scale_loss(total)

    def _stream(self, number: int, rows: int, inputs: dict[str, Any]) -> tuple[Tensor, ...]:
        """Return examples of what a stage sends: the stream, and behind an encoder its result."""
        if number < 0:
            return (torch.zeros(rows, device=self._device),)
        if number == len(self.cut) - 1:
            return (torch.zeros(1, device=self._device, requires_grad=True),)
        part = _part_of(self.cut[number].stop - 1, self._sizes)
        # Layers keep the shape of what they get, so the embeddings alone tell it.
        meta = {name: value.to("meta") if isinstance(value, Tensor) else value for name, value in inputs.items()}
        shapes = [self._shapes.embed(index, meta).shape for index in range(part, -1, -1)]
        return tuple(torch.zeros(shape, device=self._device, requires_grad=True) for shape in shapes)

    def own_stages(self) -> list[Stage]:
        """Return the stages of this rank."""
        return list(self.stages)  # type: ignore[arg-type]

    def _groups_of_tied(self, mesh: DeviceMesh, schedule: str) -> dict[str, dist.ProcessGroup | None]:
        """Make a group of the ranks that hold a copy; None where one rank has them all. Called by all ranks."""
        num_ranks = self._group.size()
        rank_of = {n: rank for rank in range(num_ranks) for n in stage_numbers(schedule, rank, num_ranks)}
        tied = {name: holders for name, holders in self._holders.items() if len(holders) > 1}
        made: dict[tuple[int, ...], dist.ProcessGroup | None] = {}
        found: dict[str, dist.ProcessGroup | None] = {}
        for name, holders in sorted(tied.items()):
            ranks = tuple(sorted({rank_of[number] for number in holders}))
            if ranks not in made:
                made[ranks] = group_over_stages(mesh, ranks)
            if self._group.rank() in ranks:
                found[name] = made[ranks]
        return found

    @torch.no_grad()
    def _sum_tied(self) -> None:
        """Add up the gradients of a parameter that several stages hold, so that its copies stay equal."""
        own = dict(self.named_parameters())
        for name, group in self._tied_groups.items():
            gradient = own[name].grad
            if group is not None and gradient is not None:
                total = local(gradient).contiguous()
                dist.all_reduce(total, group=group)
                local(gradient).copy_(total)

    def counted_parameters(self) -> list[nn.Parameter]:
        """Return the parameters whose gradients enter the norm from this rank: a tied one does from one stage."""
        first = {name: min(holders) for name, holders in self._holders.items()}
        own: dict[str, nn.Parameter] = {}
        for number, stage in zip(self.numbers, self.own_stages(), strict=True):
            for name, parameter in stage.module.named_parameters():
                if first[name] == number:
                    own[name] = parameter
        return list(own.values())


def _holders_of(model: nn.Module, plan: ParallelPlan, cut: list[range]) -> tuple[Holders, Holders]:
    """Return which stages hold each parameter (more than one, if it is tied over stages), and each buffer."""
    parameters: Holders = {}
    buffers: Holders = {}
    for number, layers in enumerate(cut):
        part = copy.deepcopy(model)
        prune(part, plan, layers)
        for name, _ in part.named_parameters():
            parameters.setdefault(name, []).append(number)
        for name, _ in part.named_buffers(remove_duplicate=False):
            buffers.setdefault(name, []).append(number)
    return parameters, buffers


def _part_of(layer: int, sizes: Sequence[int]) -> int:
    ends = accumulate(sizes)
    return next(part for part, end in enumerate(ends) if layer < end)


def _once(parts: Iterable[Iterable[tuple[str, Any]]]) -> Iterator[tuple[str, Any]]:
    seen: set[str] = set()
    for name, value in chain.from_iterable(parts):
        if name not in seen:
            seen.add(name)
            yield name, value
