"""Runs of ranks that are wrong, each in one way, as a fault of `parallel` or of the step would make them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from eagleray.parallel import Pipeline, data_coordinate
from eagleray.parallel.local import local
from eagleray.tasks.base import Features
from eagleray_jobs.data.cursor import Cursor, deal_rows
from eagleray_jobs.train.batches import Rows
from eagleray_jobs.train.exchange import Exchange, Pending, Totals
from eagleray_jobs.train.parts import Parts

Parameters = Mapping[str, nn.Parameter]


class NoFault:
    """Changes nothing; the others change one thing each."""

    def parts(self, parts: Parts) -> Parts:
        return parts

    def cut(self, module: nn.Module) -> None: ...

    def backward(self, parameters: Parameters) -> None: ...


@dataclass
class Scaled(NoFault):
    """Gradients whose name holds `part` come out times `factor`, on every rank or on one."""

    factor: float
    part: str = ""
    only_rank: int | None = None

    def backward(self, parameters: Parameters) -> None:
        if self.only_rank in (None, dist.get_rank()):
            for name, parameter in parameters.items():
                if self.part in name and parameter.grad is not None:
                    local(parameter.grad).mul_(self.factor)


@dataclass
class ReducedTwice(NoFault):
    """Gradients whose name holds `part`, and which every rank has whole, are summed over the ranks again."""

    part: str

    def backward(self, parameters: Parameters) -> None:
        for name, parameter in parameters.items():
            if self.part in name and parameter.grad is not None and local(parameter.grad) is parameter.grad:
                dist.all_reduce(parameter.grad)


@dataclass
class MissingOnOneRank(NoFault):
    """Rank 1 adds nothing to a gradient that the ranks reduce."""

    name: str

    def cut(self, module: nn.Module) -> None:
        if dist.get_rank() == 1:
            dict(module.named_parameters())[self.name].register_hook(torch.zeros_like)


class SliceRepeated(NoFault):
    """Rank 1 reads the rows of rank 0."""

    def parts(self, parts: Parts) -> Parts:
        return replace(parts, train=RowsOfAnother(parts)) if dist.get_rank() == 1 else parts


class RowsOfAnother:
    """The rows of the first share of each of the first global batches, in the place of one's own."""

    def __init__(self, parts: Parts) -> None:
        self._rows: Rows = parts.train
        self.lengths: NDArray[Any] = parts.train.lengths
        config = parts.task.config.train
        assert config is not None
        cursor, where = (
            Cursor(len(parts.train), config.global_batch_size, config.seed),
            data_coordinate(parts.mesh),
        )
        self._instead: dict[int, int] = {}
        for batch in map(cursor.batch, range(5)):
            first, own = (deal_rows(batch, self.lengths[batch], rank, where.world)[0] for rank in (0, where.rank))
            self._instead |= dict(zip(own.tolist(), first.tolist(), strict=True))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Features:
        return self._rows[self._instead.get(index, index)]


class LocalCount(NoFault):
    """Each rank divides by twice the tokens that it counted itself, not by those of all ranks."""

    def parts(self, parts: Parts) -> Parts:
        parts.exchange.close()
        return replace(parts, exchange=CountsAlone(20.0))


class CountsAlone(Exchange):
    def start(self, loss: float, count: int, *, stop: bool, saving: bool) -> Pending:
        return OwnTotals(super().start(loss, count, stop=stop, saving=saving), count * self.world_size)


class OwnTotals(Pending):
    def __init__(self, inner: Pending, count: int) -> None:
        self._inner = inner
        self._count = float(count)

    def wait(self) -> Totals:
        return replace(self._inner.wait(), count=self._count)


class MicroBatchDropped(NoFault):
    """The first stage of a pipeline gets no gradient of one of its micro-batches; the loss is right."""

    def cut(self, module: nn.Module) -> None:
        assert isinstance(module, Pipeline)
        stage = module.own_stages()[0]
        if stage.is_first:
            stage.register_forward_hook(self._drop)
            self._calls = 0

    def _drop(self, stage: nn.Module, args: Any, output: Any) -> Any:
        self._calls += 1
        if self._calls != 2:
            return output
        return tuple(value.detach() + 0.0 * value for value in output)
