"""A file in a few lines: what it resolves to."""

from __future__ import annotations

from eagleray.config.crosschecks import layout_of
from eagleray.config.loader import LoadedFile
from eagleray.config.schema import RunConfig


def summarize(loaded: LoadedFile) -> str:
    """Return what a file resolves to, one line per section, for people."""
    config = loaded.config
    lines = {
        "task": config.task,
        "store": config.store,
        "model": _model(config),
        "data": _data(config),
        "train": _train(config),
        "workers": _workers(config),
        "serve": _serve(config),
    }
    body = "\n".join(f"  {key:<8} {value}" for key, value in lines.items())
    return f"{loaded.path}: valid, {config.name}\n{body}"


def _model(config: RunConfig) -> str:
    model = config.model
    origin = next(
        f"{key} {value}" for key in ("family", "pretrained", "factory") if (value := getattr(model, key))
    )
    settings = ", ".join(f"{key} {value}" for key, value in model.config.items())
    return f"{origin} ({settings})" if settings else origin


def _data(config: RunConfig) -> str:
    return str(config.data.source or config.data.train or "none")


def _train(config: RunConfig) -> str:
    train = config.train
    if train is None:
        return "nothing: this file only serves"
    length = f"{train.max_steps} steps" if train.max_steps is not None else f"{train.num_train_epochs:g} epochs"
    shape = f"{train.optim} at {train.learning_rate:g}, {train.lr_scheduler_type}"
    return f"{length} of {train.global_batch_size} examples, {shape}"


def _workers(config: RunConfig) -> str:
    layout = layout_of(config)
    each = ", ".join(f"{amount:g} {name}" for name, amount in config.resources.resources_per_worker.items())
    return f"{layout.num_workers} ({layout}), each with {each}; GPUs: {config.resources.use_gpu}"


def _serve(config: RunConfig) -> str:
    serve, scaling = config.serve, config.serve.autoscaling_config
    auto = f"{scaling.min_replicas} to {scaling.max_replicas}"
    replicas = auto if serve.num_replicas == "auto" else str(serve.num_replicas)
    if serve.follow is not None:
        return f"{config.name}@{serve.follow.removeprefix('@')}, followed, {replicas} replicas"
    return f"{config.name}{serve.ref or '@best'}, {replicas} replicas"
