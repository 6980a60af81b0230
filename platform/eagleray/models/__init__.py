"""Model families: build, initialise, restore."""

from eagleray.models.build import build_model, load_weights, model_files, open_pretrained, restore_model
from eagleray.models.initialize import initialize, materialize

__all__ = [
    "build_model",
    "initialize",
    "load_weights",
    "materialize",
    "model_files",
    "open_pretrained",
    "restore_model",
]
