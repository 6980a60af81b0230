"""Model families: build, initialise, restore."""

from eagleray.models.base import Base, pretrained_base, whole_weights
from eagleray.models.build import (
    Unfilled,
    base_tensors,
    build_model,
    build_unfilled,
    check_fit,
    is_on_meta,
    load_weights,
    model_files,
    open_pretrained,
    restore_model,
    restore_unfilled,
    set_adapters,
    stored_tensors,
)
from eagleray.models.initialize import initialize, materialize

__all__ = [
    "Base",
    "Unfilled",
    "base_tensors",
    "build_model",
    "build_unfilled",
    "check_fit",
    "initialize",
    "is_on_meta",
    "load_weights",
    "materialize",
    "model_files",
    "open_pretrained",
    "pretrained_base",
    "restore_model",
    "restore_unfilled",
    "set_adapters",
    "stored_tensors",
    "whole_weights",
]
