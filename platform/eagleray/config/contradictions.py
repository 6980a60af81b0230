"""Two legal settings that contradict each other: one of them has no effect, and the user should know."""

from __future__ import annotations

from eagleray.config.problems import shown
from eagleray.config.schema import DataConfig, RunConfig, ServeConfig, TrainConfig


def find_contradictions(config: RunConfig) -> list[str]:
    """Return one line for each pair of settings of which one has no effect, with both values."""
    found = _in_data(config.data) + _in_model(config) + _in_serve(config.serve)
    return found + (_in_train(config.train) if config.train is not None else [])


def _in_train(train: TrainConfig) -> list[str]:
    given, found = train.model_fields_set, []
    of_adamw = sorted(given & {"adam_beta1", "adam_beta2", "adam_epsilon"})
    if train.optim == "sgd" and of_adamw:
        found.append(_unused(f"train.{of_adamw[0]}", getattr(train, of_adamw[0]), "train.optim", "sgd"))
    if train.optim == "adamw" and train.momentum > 0:
        found.append(_unused("train.momentum", train.momentum, "train.optim", "adamw"))
    reference = train.learning_rate_reference_batch_size
    if train.learning_rate_scaling == "none" and reference is not None:
        found.append(
            _unused("train.learning_rate_reference_batch_size", reference, "train.learning_rate_scaling", "none")
        )
    if train.early_stopping_patience is None and train.early_stopping_threshold > 0:
        found.append(
            _unused(
                "train.early_stopping_threshold",
                train.early_stopping_threshold,
                "train.early_stopping_patience",
                None,
            )
        )
    return found + _in_steps(train)


def _in_steps(train: TrainConfig) -> list[str]:
    if train.max_steps is None:
        return []
    found = []
    if train.warmup_steps >= max(train.max_steps, 1):
        found.append(
            f"train.warmup_steps is {train.warmup_steps:g} and train.max_steps is {train.max_steps}: the learning "
            "rate never leaves the warm-up"
        )
    if train.stop_at_step is not None and train.stop_at_step >= train.max_steps:
        found.append(_unused("train.stop_at_step", train.stop_at_step, "train.max_steps", train.max_steps))
    for name in ("eval_steps", "save_steps"):
        steps = getattr(train, name)
        if steps is not None and steps > train.max_steps:
            found.append(_unused(f"train.{name}", steps, "train.max_steps", train.max_steps))
    return found


def _in_data(data: DataConfig) -> list[str]:
    given, found = data.model_fields_set, []
    for split in ("validation", "test"):
        files, share = getattr(data, split), f"{split}_split"
        if files is not None and share in given:
            found.append(_unused(f"data.{share}", getattr(data, share), f"data.{split}", files))
    if data.languages is not None and data.source != "cldr-langid":
        found.append(_unused("data.languages", data.languages, "data.source", data.source))
    return found


def _in_model(config: RunConfig) -> list[str]:
    model, found = config.model, []
    if model.pretrained is not None and "tokenizer" in model.model_fields_set:
        tokenizer = model.tokenizer.model_dump(exclude_unset=True)
        found.append(_unused("model.tokenizer", tokenizer, "model.pretrained", model.pretrained))
    return found


def _in_serve(serve: ServeConfig) -> list[str]:
    scaling = serve.autoscaling_config
    if serve.num_replicas != "auto" and "autoscaling_config" in serve.model_fields_set:
        value = scaling.model_dump(exclude_unset=True)
        return [_unused("serve.autoscaling_config", value, "serve.num_replicas", serve.num_replicas)]
    return []


def _unused(key: str, value: object, because_key: str, because: object) -> str:
    return f"{key} is {shown(value)}, which has no effect while {because_key} is {shown(because)}"
