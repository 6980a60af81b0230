"""Hugging Face checkpoints as a source of weights: which tensor of which file a parameter is."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagleray.errors import ConfigError
from eagleray.models.sources import Place, SafetensorsFiles, read_part
from eagleray.models.tied import untie

_ROWS = 4096
_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"


def find_weights(model: nn.Module, directory: Path, *, allow_other_shapes: bool) -> SafetensorsFiles | None:
    """Find the tensors of a model in a checkpoint, as transformers does: renamed, with or without a prefix.

    Args:
        model: The model, on `meta`.
        directory: The checkpoint.
        allow_other_shapes: A tensor of another shape is left out; else it is an error.

    Returns:
        The tensors; None where they must be computed from the stored ones, which only transformers knows.

    Raises:
        ConfigError: A tensor has another shape.
    """
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    found: dict[str, Place] = {}
    rename = _Renaming(model, state)
    for place in _stored(directory):
        name = rename(place.key)
        if name is None:
            return None
        if name in state:
            shape = tuple(state[name].shape)
            if place.shape == shape:
                found[name] = place
            elif not allow_other_shapes:
                raise ConfigError(
                    f"{place.path}: {place.key} has the shape {place.shape}, the model's {name} {shape}",
                    "leave out the keys of model.config that change it",
                )
    return _once(model, found) if found else None


def _once(model: nn.Module, found: Mapping[str, Place]) -> SafetensorsFiles:
    """Name every tensor once; where the files hold other values under the name of a tied one, it is untied."""
    first = {id(tensor): name for name, tensor in [*model.named_buffers(), *model.named_parameters()]}
    state: dict[str, Tensor] = model.state_dict(keep_vars=True)
    places: dict[str, Place] = {}
    # Where a tensor is stored under its first name that one is compared with, else any.
    for name, place in sorted(found.items(), key=lambda item: first[id(state[item[0]])] != item[0]):
        known = places.setdefault(first[id(state[name])], place)
        if known is not place and not _is_equal(known, place):
            untie(model, [name])
            places[name] = place
    return SafetensorsFiles(places)


def _is_equal(one: Place, other: Place) -> bool:
    """Compare two tensors of files, some rows at a time."""
    starts = range(0, one.shape[0], _ROWS) if one.shape else [0]
    boxes = [(slice(start, start + _ROWS),) if one.shape else () for start in starts]
    return all(torch.equal(read_part(one, box), read_part(other, box)) for box in boxes)


class _Renaming:
    """Stored names as the model's; None where a tensor must be computed from several, or is stored otherwise."""

    def __init__(self, model: Any, state: dict[str, Tensor]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter

        transforms = get_model_conversion_mapping(model)
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._renamings = [each for each in transforms if not isinstance(each, WeightConverter)]
        self._prefix, self._state = model.base_model_prefix, state

    def __call__(self, key: str) -> str | None:
        from transformers.core_model_loading import rename_source_key

        name, converter = rename_source_key(key, self._renamings, self._converters, self._prefix, self._state)
        if name not in self._state and key in self._state:
            name, converter = rename_source_key(key, [], [], self._prefix, self._state)
        return name if converter is None else None


def _stored(directory: Path) -> Iterator[Place]:
    from safetensors import safe_open

    for path in _files(directory):
        with safe_open(path, framework="pt") as opened:
            for key in opened.keys():
                yield Place(path, key, tuple(opened.get_slice(key).get_shape()))


def _files(directory: Path) -> list[Path]:
    index = directory / _INDEX
    if index.is_file() and not (directory / _SINGLE).is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [directory / name for name in sorted(set(names))]
    return [directory / _SINGLE] if (directory / _SINGLE).is_file() else []
