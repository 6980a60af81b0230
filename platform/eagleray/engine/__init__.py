"""Inference: a checkpoint that answers; knows neither Serve nor HTTP."""

from eagleray.engine.batcher import Batcher, BatchLimits, Lane
from eagleray.engine.engine import Engine, ModelSummary, load_engine
from eagleray.engine.items import ItemError, Prepared
from eagleray.engine.work import in_batches
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
    "in_batches",
    "load_engine",
]
