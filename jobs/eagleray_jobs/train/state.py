"""Model, optimizer and progress as the tensors and the JSON of a checkpoint, under names without a layout."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from eagleray.errors import CheckpointDamagedError
from eagleray_jobs.train.optimizer import create_state
from eagleray_jobs.train.progress import Progress


class Restorable(Protocol):
    """What restoring needs of a committed version."""

    ref: str

    def state(self) -> dict[str, Any]:
        """Return `state.json`."""
        ...

    def load_into(self, tensors: dict[str, Tensor]) -> int:
        """Fill tensors in place, each rank its part; return the bytes read."""
        ...


class TrainState:
    """What a checkpoint holds of a training run.

    The seam has four methods because there are four things that a layout must not change: which tensors there
    are (`tensors`), what else must be known to go on (`record`), how both come back (`restore`), and how
    another run's weights alone come in (`load_weights`). Names are those of the unwrapped module, also
    under DDP; a parameter that is cut over ranks is a DTensor under the same name, so the store sees one
    global tensor whatever the layout. Tensors are loaded in place: nothing exists twice, and what the
    optimizer and DDP already hold stays valid.

    Args:
        module: The model itself, not its DDP wrapper.
        optimizer: Over the trained parameters of `module`.
        scaler: The loss scale of float16; its state is part of exact resume.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler) -> None:
        self._module = module
        self._optimizer = optimizer
        self._scaler = scaler

    def tensors(self) -> dict[str, Tensor]:
        """Return the live tensors: `model.<name>`, and `optim.<name>.<state>` of trained parameters."""
        return self._model_tensors() | self._optimizer_tensors()

    def record(self, progress: Progress) -> dict[str, Any]:
        """Return what goes into `state.json`."""
        return progress.as_json() | {"loss_scale": self._scaler.state_dict() or None}

    def restore(self, checkpoint: Restorable) -> Progress:
        """Load weights, optimizer and loss scale in place and return how far the run was.

        Raises:
            CheckpointDamagedError: `state.json` lacks a key, or a tensor is not what the manifest says.
        """
        state = checkpoint.state()
        try:
            progress, loss_scale = Progress.from_json(state), state["loss_scale"]
        except KeyError as error:
            raise CheckpointDamagedError(f"{checkpoint.ref}: state.json has no {error}") from error
        create_state(self._optimizer)
        checkpoint.load_into(self.tensors())
        if loss_scale is not None:
            self._scaler.load_state_dict(loss_scale)
        return progress

    def load_weights(self, checkpoint: Restorable) -> None:
        """Load the weights alone, in place (`train.init_from`)."""
        checkpoint.load_into(self._model_tensors())

    def _model_tensors(self) -> dict[str, Tensor]:
        # `named_*` gives a tied tensor once; `state_dict` leaves non-persistent buffers out.
        stored = self._module.state_dict().keys()
        named = [*self._module.named_parameters(), *self._module.named_buffers()]
        return {f"model.{name}": tensor.detach() for name, tensor in named if name in stored}

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"optim.{name}.{key}": value
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad
            for key, value in self._optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
