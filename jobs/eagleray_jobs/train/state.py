"""Model, optimizer and progress as the tensors and the JSON of a checkpoint, under names without a layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from eagleray.config.schema import AdapterConfig
from eagleray.errors import CheckpointDamagedError
from eagleray.lora import is_factor, merged
from eagleray.models import stored_tensors
from eagleray_jobs.train.optimizer import create_state
from eagleray_jobs.train.progress import Progress


class Restorable(Protocol):
    """What restoring needs of a committed version."""

    @property
    def ref(self) -> str:
        """Its name, for messages."""
        ...

    def state(self) -> dict[str, Any]:
        """Return `state.json`."""
        ...

    def load_into(self, tensors: Mapping[str, Tensor], process_group: dist.ProcessGroup | None = None) -> int:
        """Fill tensors in place, each rank its part; return the bytes read."""
        ...


class TrainState:
    """What a checkpoint holds of a training run.

    Three methods, because there are three things that a layout must not change: which tensors there are
    (`tensors`), what else must be known to go on (`record`), and how both come back (`restore`). Names are those
    of the unwrapped module, also under DDP; a parameter that is cut over ranks is a DTensor under the same
    name, so the store sees one global tensor whatever the layout. Tensors are loaded in place: nothing exists
    twice, and what the optimizer and DDP already hold stays valid.

    Args:
        module: The model itself, not its DDP wrapper.
        optimizer: Over the trained parameters of `module`.
        scaler: The loss scale of float16; its state is part of exact resume.
        adapter: What the file says of an adapter. The weights that it stands on are not part of the state: they
            come from where they came from at the start.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler,
        adapter: AdapterConfig | None = None,
    ) -> None:
        self._module = module
        self._optimizer = optimizer
        self._scaler = scaler
        self._adapter = adapter

    def tensors(self) -> dict[str, Tensor]:
        """Return what a checkpoint holds; collective, since an adapter may have to be added to its weights.

        `model.<name>`, and `optim.<name>.<state>` of trained parameters. The matrices of an adapter that is merged
        are `adapter.<name>`.
        """
        if self._adapter is None or self._adapter.commit == "adapter":
            return self._live_tensors()
        whole = merged(stored_tensors(self._module), self._adapter.scale)
        return {f"model.{name}": tensor for name, tensor in whole.items()} | self._live_tensors()

    def record(self, progress: Progress) -> dict[str, Any]:
        """Return what goes into `state.json`."""
        return progress.as_json() | {"loss_scale": self._scaler.state_dict() or None}

    def restore(self, checkpoint: Restorable, process_group: dist.ProcessGroup | None) -> Progress:
        """Load weights, optimizer and loss scale in place and return how far the run was.

        Args:
            checkpoint: The version to go on from.
            process_group: The ranks that load together; gloo.

        Raises:
            CheckpointDamagedError: `state.json` lacks a key, or a tensor is not what the manifest says.
        """
        state = checkpoint.state()
        try:
            progress, loss_scale = Progress.from_json(state), state["loss_scale"]
        except KeyError as error:
            raise CheckpointDamagedError(f"{checkpoint.ref}: state.json has no {error}") from error
        create_state(self._optimizer)
        checkpoint.load_into(self._live_tensors(), process_group)
        if loss_scale is not None:
            self._scaler.load_state_dict(loss_scale)
        return progress

    def _live_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint is loaded into."""
        found = self._optimizer_tensors()
        frozen = {name for name, parameter in self._module.named_parameters() if not parameter.requires_grad}
        for name, tensor in stored_tensors(self._module).items():
            is_merged = self._adapter is not None and self._adapter.commit == "merged" and is_factor(name)
            if self._adapter is None or name not in frozen:
                found[f"{'adapter' if is_merged else 'model'}.{name}"] = tensor
        return found

    def _optimizer_tensors(self) -> dict[str, Tensor]:
        return {
            f"optim.{name}.{key}": value
            for name, parameter in self._module.named_parameters()
            if parameter.requires_grad
            for key, value in self._optimizer.state[parameter].items()
            if isinstance(value, Tensor)
        }
