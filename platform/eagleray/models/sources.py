"""Where weights are read from: each rank copies its part of each tensor, and of a file reads no more."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from eagleray.parallel.local import Box, local, own_box


class TensorSource(Protocol):
    """Whole tensors by the names of a model."""

    def holds(self, name: str) -> bool:
        """Say whether there is a tensor of that name."""
        ...

    def read(self, name: str, box: Box) -> Tensor:
        """Return a part of it."""
        ...


@torch.no_grad()
def fill_from(source: TensorSource, model: nn.Module) -> None:
    """Copy what a source holds of a model, or of a stage of it, into the parts that this rank has."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        own = local(tensor)
        if own.numel() and source.holds(name):
            own.copy_(source.read(name, own_box(tensor)))


class ModelInMemory:
    """The tensors of another model."""

    def __init__(self, model: nn.Module) -> None:
        named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
        self._tensors: dict[str, Tensor] = dict(named)

    def holds(self, name: str) -> bool:
        """Say whether the model has such a parameter or buffer."""
        return name in self._tensors

    def read(self, name: str, box: Box) -> Tensor:
        """Return a view of a part."""
        return self._tensors[name].detach()[box]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor stands: a safetensors file, the name in it, and the whole shape."""

    path: Path
    key: str
    shape: tuple[int, ...]


class SafetensorsFiles:
    """Tensors of safetensors files.

    Args:
        places: Where each stands, under the names of a model.
    """

    def __init__(self, places: Mapping[str, Place]) -> None:
        self._places = dict(places)

    def holds(self, name: str) -> bool:
        """Say whether a file holds the tensor."""
        return name in self._places

    def read(self, name: str, box: Box) -> Tensor:
        """Return a part of a tensor; of the file only its bytes are read."""
        return read_part(self._places[name], box)


def read_part(place: Place, box: Box) -> Tensor:
    """Return a part of a stored tensor."""
    from safetensors import safe_open

    with safe_open(place.path, framework="pt") as opened:
        part: Tensor = opened.get_slice(place.key)[box] if box else opened.get_tensor(place.key)
    return part
