"""What travels from a stage of a pipeline to the next one, and how a failure does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int64)
_MAX_DIMS = 8
_HEADER_LENGTH = 3 + _MAX_DIMS


class StageFailedError(Exception):
    """A stage before this one raised; this one has nothing to compute with."""


class Pipe:
    """The way between neighbouring stages.

    A stage that raises sends word of it instead of its result, so that the stages behind it do not wait and all of
    them stay in step.

    Args:
        group: The ranks of the pipeline, in the order of their stages; None: there is one stage.
        device: Where tensors are.
    """

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        self._group, self._device = group, device
        self.stage = 0 if group is None else group.rank()
        self.num_stages = 1 if group is None else group.size()

    @property
    def is_first(self) -> bool:
        """Whether nothing comes from before."""
        return self.stage == 0

    @property
    def is_last(self) -> bool:
        """Whether nothing is passed on."""
        return self.stage == self.num_stages - 1

    def pass_on(self, compute: Callable[[], Sequence[Tensor]]) -> Sequence[Tensor]:
        """Compute what the next stage needs, send it there, and return it."""
        try:
            tensors = compute()
        except Exception:
            if not self.is_last:
                self._send(torch.full((_HEADER_LENGTH,), -1, dtype=torch.int64))
            raise
        if not self.is_last:
            for number, tensor in enumerate(tensors):
                self._send(_header(tensor, len(tensors) - number - 1))
                self._send(tensor)
        return tensors

    def receive(self) -> list[Tensor]:
        """Return what the stage before sent.

        Raises:
            StageFailedError: It, or one before it, raised.
        """
        found: list[Tensor] = []
        while True:
            num_left, number, num_dims, *dims = self._receive([_HEADER_LENGTH], torch.int64).tolist()
            if num_left < 0:
                raise StageFailedError(f"stage {self.stage - 1} or one before it failed")
            found.append(self._receive(dims[:num_dims], _DTYPES[number]))
            if not num_left:
                return found

    def _send(self, tensor: Tensor) -> None:
        # gloo sends what is not contiguous wrong, without an error.
        dist.send(tensor.to(self._device).contiguous(), group=self._group, group_dst=self.stage + 1)

    def _receive(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        tensor = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        dist.recv(tensor, group=self._group, group_src=self.stage - 1)
        return tensor


def _header(tensor: Tensor, num_left: int) -> Tensor:
    dims = [*tensor.shape, *[0] * (_MAX_DIMS - tensor.dim())]
    return torch.tensor([num_left, _DTYPES.index(tensor.dtype), tensor.dim(), *dims])
