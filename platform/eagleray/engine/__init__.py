"""Inference: a checkpoint that answers; knows neither Serve nor HTTP."""

from eagleray.engine.batcher import Batcher, BatchLimits, Lane
from eagleray.engine.engine import Engine, ItemError, ModelSummary, Prepared, load_engine
from eagleray.engine.worker import ModelThread

__all__ = [
    "BatchLimits",
    "Batcher",
    "Engine",
    "ItemError",
    "Lane",
    "ModelSummary",
    "ModelThread",
    "Prepared",
    "load_engine",
]
