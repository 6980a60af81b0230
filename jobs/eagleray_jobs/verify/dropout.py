"""Switching dropout off in a model of any kind: layouts draw different random numbers."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd


def switch_off_dropout(model: nn.Module) -> float:
    """Set every dropout of a model to 0 and return the highest that there was.

    Modules of `torch.nn.Dropout`'s kind have a probability; those of Hugging Face models have numbers named
    `dropout`, `attention_dropout`, `layerdrop` or alike, in the modules or in the model's config.
    """
    places: list[Any] = list(model.modules())
    places += {id(config): config for module in places if (config := _config_of(module)) is not None}.values()
    highest = 0.0
    for place in places:
        for key, value in list(vars(place).items()):
            if _is_dropout(place, key, value):
                highest = max(highest, float(value))
                setattr(place, key, 0.0)
    return highest


def _config_of(module: nn.Module) -> Any:
    config = getattr(module, "config", None)
    return config if hasattr(config, "__dict__") else None


def _is_dropout(place: Any, key: str, value: Any) -> bool:
    if isinstance(place, _DropoutNd):
        return key == "p" and value > 0
    return "drop" in key and isinstance(value, float) and value > 0
