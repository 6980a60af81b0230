"""Runs and versions for the tests, made the way a training makes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import CheckpointSaver, SaveResult

NAME = "en-fr"


def config(*, train: Mapping[str, Any] | None = None, **sections: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": NAME,
            "task": "translation",
            "model": {"family": "marian"},
            "data": {"source": "cldr-en-fr"},
            "train": {"max_steps": 10, "metric_for_best_model": "bleu", **(train or {})},
            **sections,
        }
    )


def tensors() -> dict[str, torch.Tensor]:
    return {
        "model.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
        "model.bias": torch.tensor([0.5, -0.5]).bfloat16(),
        "optim.weight.step": torch.tensor(3.0),
    }


def owned_run(store: ObjectStore, run: int = 1, epoch: int = 1) -> RunHandle:
    key = epoch_key(NAME, run, epoch)
    if not store.exists(key):
        create_record(store, key, {"owner": {"host": "elsewhere", "pid": 1}})
    return RunHandle(store, NAME, run=run, epoch=epoch, attempt="a")


def save(store: ObjectStore, step: int, *, run: int = 1, **metrics: float) -> SaveResult:
    """Save a version through one saver; its result, whatever it is."""
    handle = owned_run(store, run)
    best = ("bleu", True)
    saver = CheckpointSaver(store, handle, layout=Layout(), config=config(), best_metric=best, timeout_s=20)
    saver.save(
        step=step,
        tensors=tensors(),
        files={"config.json": b'{"d_model": 4}'},
        state={"step": step},
        metrics=metrics,
    )
    (result,) = saver.wait()
    saver.close()
    return result


def commit(store: ObjectStore, step: int, *, run: int = 1, **metrics: float) -> str:
    """Commit a version and return its reference."""
    result = save(store, step, run=run, **metrics)
    assert result.ref is not None, result.error
    return result.ref
