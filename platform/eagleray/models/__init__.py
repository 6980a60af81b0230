"""Model families: build, initialise, restore."""

from eagleray.models.build import (
    Unfilled,
    build_model,
    build_unfilled,
    check_fit,
    load_weights,
    model_files,
    open_pretrained,
    restore_model,
    stored_tensors,
)
from eagleray.models.initialize import initialize, materialize

__all__ = [
    "Unfilled",
    "build_model",
    "build_unfilled",
    "check_fit",
    "initialize",
    "load_weights",
    "materialize",
    "model_files",
    "open_pretrained",
    "restore_model",
    "stored_tensors",
]
