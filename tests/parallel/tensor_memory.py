"""Counts the bytes of tensors that are alive, as operations make them."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from eagleray.parallel.footprint import storage_bytes as storage_bytes


class PeakTensorBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The largest sum of bytes of the tensors that were made while it was active and were alive together."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._made: list[weakref.ref[Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for made in tree_leaves(result):
            if isinstance(made, Tensor):
                part = made.to_local() if isinstance(made, DTensor) else made
                if type(part) in (Tensor, Parameter):  # fakes, by which DTensor plans, have no memory
                    self._made.append(weakref.ref(part))
        self._made = [each for each in self._made if each() is not None]
        self.peak = max(self.peak, storage_bytes(tensor for each in self._made if (tensor := each()) is not None))
        return result
