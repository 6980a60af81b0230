"""What the ranks tell each other at every step, in one small all_reduce on a gloo group of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from eagleray.gloo import new_group

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over all ranks; equal on every rank, so that all of them decide alike.

    Attributes:
        loss: Summed loss of the global batch; NaN or infinite if any rank's is.
        count: Items (tokens or examples) in it.
        stop: Whether any rank was asked to stop.
        saving: Whether any rank still writes the last checkpoint.
    """

    loss: float
    count: float
    stop: bool
    saving: bool

    @property
    def mean_loss(self) -> float:
        """Loss per item of the global batch."""
        return self.loss / max(self.count, 1.0)


class Pending:
    """Totals on their way."""

    def __init__(self, values: Tensor, work: dist.Work | None) -> None:
        self._values = values
        self._work = work

    def wait(self) -> Totals:
        """Return the totals; the group's timeout bounds the wait."""
        if self._work is not None:
            self._work.wait()
        loss, count, stop, saving = self._values.tolist()
        return Totals(loss, count, stop > 0, saving > 0)


class Exchange:
    """Small values between all ranks, off the device and off the group that carries gradients.

    Args:
        timeout_s: Seconds after which an exchange with a silent rank fails.
    """

    def __init__(self, timeout_s: float) -> None:
        # Its own group: a collective in flight on the gradients' group must not be interleaved with these.
        self.group = new_group(timeout_s=timeout_s)
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def start(self, loss: float, count: int, *, stop: bool, saving: bool) -> Pending:
        """Send this rank's share of the totals without waiting for the others'."""
        values = torch.tensor([loss, count, stop, saving], dtype=torch.float64)
        if self.world_size == 1:
            return Pending(values, None)
        return Pending(values, dist.all_reduce(values, group=self.group, async_op=True))

    def meet(self) -> None:
        """Wait for all ranks, at most for the group's timeout."""
        self.sum([0.0])

    def sum(self, values: Sequence[float]) -> list[float]:
        """Add a few numbers over all ranks."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total, group=self.group)
        return [float(value) for value in total.tolist()]

    def first_non_finite(self, loss: float) -> tuple[int, float] | None:
        """Return the first rank whose loss is NaN or infinite, and that loss; called by all ranks together."""
        losses = self.gather(loss)
        return next(((rank, value) for rank, value in enumerate(losses) if not math.isfinite(value)), None)

    def gather(self, value: T) -> list[T]:
        """Return every rank's value, in the order of ranks, on all ranks."""
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def collect(self, value: T) -> list[T] | None:
        """Return every rank's value on rank 0, None elsewhere."""
        found: list[Any] | None = [None] * self.world_size if self.rank == 0 else None
        dist.gather_object(value, found, dst=0, group=self.group)
        return found

    def broadcast(self, value: Any) -> Any:
        """Return rank 0's value on all ranks; the others' are not looked at."""
        box: list[Any] = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def close(self) -> None:
        """Give the group back."""
        dist.destroy_process_group(self.group)
