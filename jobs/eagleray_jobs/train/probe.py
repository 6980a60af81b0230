"""A look into the steps of a run from inside, for `eagleray verify` and its tests."""

from __future__ import annotations

from typing import Protocol

from torch import nn


class Probe(Protocol):
    """Sees what the loop trains, and its gradients before they are used.

    Called on every rank alike, so a probe may communicate. What it changes is what the run goes on with: that is
    how tests make a step wrong.
    """

    def cut(self, module: nn.Module) -> None:
        """Learn what this rank trains: the model, or its stages, under the model's names."""
        ...

    def backward(self, step: int, scale: float) -> None:
        """Look at the gradients of a step (counted from 1) before they are scaled, clipped and used.

        Args:
            step: The step.
            scale: What turns them into gradients of the mean over the global batch.
        """
        ...
