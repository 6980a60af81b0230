"""The ranks that save together: each stage succeeds on all of them or fails on all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.distributed as dist

from eagleray.errors import EaglerayError, FencedError, PeersLostError, StoreError
from eagleray.gloo import new_group

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True, slots=True)
class Stage(Generic[T]):
    """What a stage gave on one rank: a value, or an error that is sent instead."""

    value: T | None = None
    error: Exception | None = None

    @classmethod
    def of(cls, function: Callable[[], T]) -> Stage[T]:
        """Call a function and keep what it raises."""
        try:
            return cls(value=function())
        except EaglerayError as error:
            return cls(error=error)
        except Exception as error:
            # Any error may come from a store or a tensor; only its text is sure to pickle.
            return cls(error=StoreError(f"{type(error).__name__}: {error}"))


class Peers:
    """Collectives of small objects on a gloo group of its own; without torch.distributed: one rank.

    Args:
        ranks: Global ranks of the members; None: this process alone.
        timeout_s: Seconds that a member may be late.
    """

    def __init__(self, ranks: Sequence[int] | None, timeout_s: float) -> None:
        self._group: Any = None
        self._is_part = False
        self.rank, self.world_size = 0, 1
        if ranks is not None:
            # A group of some ranks is named after them; were it given back, the next one of that name would meet
            # its old addresses.
            self._is_part = len(ranks) < dist.get_world_size()
            self._group = new_group(ranks, timeout_s=timeout_s, use_local_synchronization=self._is_part)
            self.rank, self.world_size = dist.get_rank(self._group), len(ranks)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that commits."""
        return self.rank == 0

    def close(self) -> None:
        """Give the group back."""
        if self._group is not None and not self._is_part:
            dist.destroy_process_group(self._group)
        self._group = None

    def all_gather(self, value: T) -> list[T]:
        """Every rank's value on every rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.world_size
        self._collective(lambda: dist.all_gather_object(values, value, group=self._group))
        return values

    def together(self, step: Callable[[], T], join: Callable[[list[T]], list[R]]) -> R:
        """Run `step` on all ranks, then `join` on the first if all succeeded; give each rank its part.

        Raises:
            StoreError: A rank failed; the same error on all of them.
            PeersLostError: A rank did not answer.
        """
        stages = self._gather(Stage.of(step))
        parts: list[Stage[R]] | None = None
        if stages is not None:
            failed = self._failure(stages)
            joined: Stage[list[R]] = Stage(error=failed) if failed else Stage.of(lambda: join(_values(stages)))
            parts = [Stage(error=joined.error)] * self.world_size if joined.error else _stages(joined)
        part = self._scatter(parts)
        if part.error is not None:
            raise part.error
        return part.value  # type: ignore[return-value]

    def _failure(self, stages: Sequence[Stage[T]]) -> Exception | None:
        failed = {rank: stage.error for rank, stage in enumerate(stages) if stage.error is not None}
        if not failed:
            return None
        fenced = [error for error in failed.values() if isinstance(error, FencedError)]
        if fenced or self.world_size == 1:
            return fenced[0] if fenced else failed[0]
        ranks = ", ".join(map(str, failed))
        first = next(iter(failed.values()))
        return StoreError(
            f"rank {ranks} of {self.world_size}: {getattr(first, 'message', first)}",
            hint=getattr(first, "hint", None),
        )

    def _gather(self, value: T) -> list[T] | None:
        if self._group is None:
            return [value]
        values: list[Any] | None = [None] * self.world_size if self.is_first else None
        self._collective(lambda: dist.gather_object(value, values, group_dst=0, group=self._group))
        return values

    def _scatter(self, values: list[Stage[R]] | None) -> Stage[R]:
        if self._group is None:
            assert values is not None
            return values[0]
        received: list[Any] = [None]
        self._collective(lambda: dist.scatter_object_list(received, values, group_src=0, group=self._group))
        part: Stage[R] = received[0]
        return part

    def _collective(self, call: Callable[[], Any]) -> None:
        try:
            call()
        except (RuntimeError, ValueError) as error:
            raise PeersLostError(f"a rank did not take part in the save: {str(error).splitlines()[0]}") from error


def _values(stages: Sequence[Stage[T]]) -> list[T]:
    return [stage.value for stage in stages]  # type: ignore[misc]


def _stages(joined: Stage[list[R]]) -> list[Stage[R]]:
    assert joined.value is not None
    return [Stage(value=part) for part in joined.value]
