"""A committed version in memory, with the surface that an engine and an export read."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import tiny_config, tiny_parts

from eagleray.config.schema import RunConfig
from eagleray.models import model_files


class FakeCheckpoint:
    def __init__(self, config: RunConfig, files: dict[str, bytes], tensors: dict[str, torch.Tensor]) -> None:
        self.ref = f"{config.name}@r1-step-00000010"
        self.version = "r1-step-00000010"
        self._config, self._files, self._tensors = config, files, tensors

    def config(self) -> RunConfig:
        return self._config

    def files(self) -> dict[str, bytes]:
        return dict(self._files)

    def tensors(self, prefix: str = "model.") -> dict[str, torch.Tensor]:
        return dict(self._tensors) if prefix == "model." else {}


def weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return what a checkpoint stores of a model: parameters once, and persistent buffers."""
    state = model.state_dict()
    buffers = {name for name, _ in model.named_buffers()}
    names = [*(name for name, _ in model.named_parameters()), *(buffers & state.keys())]
    return {name: state[name].clone() for name in names}


def tiny_checkpoint(task: str = "translation", **changes: Any) -> tuple[FakeCheckpoint, torch.nn.Module]:
    """Return a version of a tiny model, and the model it was made from."""
    config = tiny_config(task, **changes)
    _, processor, model = tiny_parts(config)
    return FakeCheckpoint(config, model_files(model, config, processor), weights(model)), model.eval()
