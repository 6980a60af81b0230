"""Building a model for training, and rebuilding it from the files of a checkpoint."""

from __future__ import annotations

import fnmatch
import inspect
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from eagleray.config.schema import ModelConfig, RunConfig
from eagleray.errors import CheckpointDamagedError, ConfigError
from eagleray.hub import locate_pretrained, without_progress_bars
from eagleray.lora import LowRank, add_adapter, is_factor
from eagleray.models.families import build_family, label_keys
from eagleray.models.initialize import initialize
from eagleray.models.pretrained import find_weights
from eagleray.models.sources import TensorSource, fill_from
from eagleray.models.tied import untie
from eagleray.parallel.local import Fill, materialize
from eagleray.tasks import Processor, task_class
from eagleray.tasks.base import Head
from eagleray.tasks.tokenizer import as_directory, save_to_files
from eagleray.user_code import import_attribute

_AUTO_CLASSES: dict[Head, str] = {
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "sequence-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
CONFIG_FILE, GENERATION_FILE = "config.json", "generation_config.json"


Unfilled = tuple[nn.Module, Fill | None]
"""A model on `meta`, and what gives it its weights; or one with its weights, and None."""


def build_unfilled(config: RunConfig, processor: Processor) -> Unfilled:
    """Build the model that a run starts from without memory for it, so that a layout can cut it first.

    It is in training mode, float32, frozen where the file says so. Weights that are not pretrained depend on
    (`train.seed`, parameter name) alone; of pretrained ones each rank reads its part. Two kinds of models come
    with all of their weights in memory: what a factory does not build on `meta`, and checkpoints that
    transformers computes other weights from. A factory's module keeps the weights that it was built with;
    torch's random numbers are seeded before.

    Raises:
        ConfigError: The file does not fit the model.
    """
    seed, new = config.train.seed if config.train else 0, set[str]()
    fill: Fill | None
    if config.model.factory is not None:
        model = _call_factory(config.model, processor, seed)
        fill = partial(initialize, seed=seed) if is_on_meta(model) else None
    elif config.model.pretrained is not None:
        model, fill, new = _pretrained(config, processor, seed)
    else:
        model, fill = build_family(config, processor), partial(initialize, seed=seed)
    if config.model.adapter is not None:
        add_adapter(model, config.model.adapter)
        _check_new(model, new)
        if fill is None:
            set_adapters(model, seed)
    freeze(model, config.model.freeze)
    return model.train(), fill


def build_model(config: RunConfig, processor: Processor, device: torch.device | str) -> nn.Module:
    """Build the model that a run starts from, whole, with its weights; see `build_unfilled`.

    Raises:
        ConfigError: The file does not fit the model.
    """
    model, fill = build_unfilled(config, processor)
    materialize(model, device)
    if fill is not None:
        fill(model)
    return model


def model_files(model: nn.Module, config: RunConfig, processor: Processor) -> dict[str, bytes]:
    """Return what stands beside the weights of a checkpoint, by file name.

    Args:
        model: The unwrapped model.
        config: The file of the run.
        processor: The task's processor.
    """
    files = processor.files()
    hf_model: Any = model
    if config.model.factory is None:
        hf_model.config.architectures = [type(model).__name__]
        files |= save_to_files(hf_model.config.save_pretrained)
        if getattr(hf_model, "generation_config", None) is not None:
            files |= save_to_files(hf_model.generation_config.save_pretrained)
    return files


def restore_model(config: RunConfig, files: Mapping[str, bytes]) -> nn.Module:
    """Rebuild a model from the files of a checkpoint, on the CPU; its parameters are undefined until loaded.

    Nothing of where the run started (`model.pretrained`) is needed.

    Raises:
        ConfigError: The user's factory cannot be imported.
        CheckpointDamagedError: `config.json` is missing.
    """
    model = restore_unfilled(config, files)
    if is_on_meta(model):
        materialize(model, "cpu")
        initialize(model, None)
    return model


def restore_unfilled(config: RunConfig, files: Mapping[str, bytes]) -> nn.Module:
    """Rebuild a model as `restore_model` does, on `meta`; what a factory builds elsewhere is where it built it.

    Raises:
        ConfigError: The user's factory cannot be imported.
        CheckpointDamagedError: `config.json` is missing.
    """
    if config.model.factory is not None:
        return _call_factory(config.model, task_class(config.task)(config).load_processor(files), 0)
    if CONFIG_FILE not in files:
        raise CheckpointDamagedError(f"the checkpoint of {config.name} holds no {CONFIG_FILE}")
    import transformers

    names = (CONFIG_FILE, GENERATION_FILE)
    with as_directory({name: files[name] for name in names if name in files}) as directory:
        hf_config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        return _from_config(config, hf_config, Path(directory))  # type: ignore[no-any-return]


def load_weights(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy a checkpoint's tensors into a model, each exactly once; a new adapter stays as it is.

    Raises:
        CheckpointDamagedError: A tensor of the model is missing, or one has no place in it.
    """
    untie(model, tensors.keys())
    check_fit(model, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, tensor in base_tensors(model).items():
            tensor.copy_(tensors[name])


def check_fit(model: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse weights that are not those of a model, by their names and shapes.

    Raises:
        CheckpointDamagedError: A tensor of the model is missing, or one has no place in it.
    """
    own = base_tensors(model)
    if own.keys() != shapes.keys():
        missing, unknown = sorted(own.keys() - shapes.keys()), sorted(shapes.keys() - own.keys())
        raise CheckpointDamagedError(
            f"the weights do not fit the model: missing {missing or 'none'}, unknown {unknown or 'none'}"
        )
    for name, tensor in own.items():
        if tuple(tensor.shape) != shapes[name]:
            raise CheckpointDamagedError(
                f"the weights do not fit the model: {name} is {shapes[name]} in the checkpoint "
                f"and {tuple(tensor.shape)} in the model"
            )


def stored_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint holds of a model: parameters and persistent buffers, a tied one once."""
    # state_dict names a shared parameter several times, named_parameters once: as the checkpoint does.
    stored = model.state_dict().keys()
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if name in stored}


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return what a checkpoint of the same model without adapters holds."""
    return {name: tensor for name, tensor in stored_tensors(model).items() if not is_factor(name)}


def set_adapters(model: nn.Module, seed: int) -> None:
    """Give the adapters of a model, or of a stage of it, their first values; nothing else is touched."""
    factors = {name for name, module in model.named_modules() if isinstance(module, LowRank)}
    initialize(model, seed, modules=factors)


def _check_new(model: nn.Module, new: set[str]) -> None:
    """Refuse parameters that the pretrained checkpoint does not hold and the adapter does not train.

    Raises:
        ConfigError: There are such.
    """
    untrained = sorted(name for name in new if not model.get_parameter(name).requires_grad)
    if untrained:
        modules = dict.fromkeys(name.rpartition(".")[0] for name in untrained)
        raise ConfigError(
            f"model.adapter: the pretrained checkpoint does not hold {', '.join(untrained)}, and only the adapter "
            "is trained",
            f"name their modules under model.adapter.modules_to_save: {', '.join(modules)}",
        )


def freeze(model: nn.Module, patterns: list[str]) -> None:
    """Stop the training of the parameters that match a shell pattern.

    Raises:
        ConfigError: A pattern matches nothing, or nothing is left to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        matching = fnmatch.filter(names, pattern)
        if not matching:
            raise ConfigError(
                f"model.freeze: {pattern!r} matches none of the {len(names)} parameters",
                f"they are named like {', '.join(list(names)[:3])}",
            )
        for name in matching:
            names[name].requires_grad_(False)
    if patterns and not any(parameter.requires_grad for parameter in names.values()):
        raise ConfigError("model.freeze leaves no parameter to train")


def _auto_class(config: RunConfig) -> Any:
    import transformers

    head = task_class(config.task).head
    if head is None:
        raise ConfigError(
            f"task {config.task} does not say which Hugging Face models it works with",
            "set `head` in your Task, or use model.factory",
        )
    return getattr(transformers, _AUTO_CLASSES[head])


def open_pretrained(config: RunConfig, processor: Processor) -> tuple[nn.Module, set[str]]:
    """Open the checkpoint of `model.pretrained` whole, float32.

    Returns:
        The model, and the parameters that the checkpoint does not hold: the head, where its classes are others.

    Raises:
        ConfigError: It cannot be opened safely, or `model.config` names a key that it does not have.
    """
    directory = locate_pretrained(config.model)
    with without_progress_bars():
        model, info = _auto_class(config).from_pretrained(
            directory,
            config=_pretrained_config(config, processor, directory),
            use_safetensors=True,
            trust_remote_code=False,
            dtype=torch.float32,
            ignore_mismatched_sizes=bool(processor.labels),
            output_loading_info=True,
        )
    new = {*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])}
    model.config.name_or_path = ""  # a directory of this machine, which must not travel in a checkpoint
    return model, new


def _pretrained(config: RunConfig, processor: Processor, seed: int) -> tuple[nn.Module, Fill | None, set[str]]:
    """Return the model, what fills it, and the parameters that the checkpoint does not hold."""
    directory = locate_pretrained(config.model)
    hf_config = _pretrained_config(config, processor, directory)
    model = _from_config(config, hf_config, directory)
    weights = find_weights(model, directory, allow_other_shapes=bool(processor.labels))
    if weights is not None:
        new = {name for name, _ in model.named_parameters() if not weights.holds(name)}
        return model, partial(_fill_pretrained, weights=weights, seed=seed), new
    model, new = open_pretrained(config, processor)
    if new:
        initialize(model, seed, only=new)
    return model, None, new


def _fill_pretrained(model: nn.Module, *, weights: TensorSource, seed: int) -> None:
    new = {name for name, _ in model.named_parameters() if not weights.holds(name)}
    initialize(model, seed, only=new)
    fill_from(weights, model)


def _pretrained_config(config: RunConfig, processor: Processor, directory: Path) -> Any:
    import transformers

    hf_config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
    for key, value in config.model.config.items():
        if not hasattr(hf_config, key):
            raise ConfigError(
                f"model.config: {key!r} is no key of {type(hf_config).__name__}",
                f"its keys are {', '.join(sorted(hf_config.to_dict()))}",
            )
        setattr(hf_config, key, value)
    if task_class(config.task).head != "seq2seq-lm" and hasattr(hf_config, "use_cache"):
        hf_config.use_cache = False  # a classifier reads its input once
    if processor.labels and tuple(hf_config.id2label.values()) != tuple(processor.labels):
        for key, value in label_keys(processor).items():
            setattr(hf_config, key, value)
    return hf_config


def _from_config(config: RunConfig, hf_config: Any, directory: Path) -> Any:
    """Build a model on `meta`, with what a directory says about generation."""
    import transformers

    hf_config.name_or_path = ""  # a directory of this machine, which must not travel in a checkpoint
    with torch.device("meta"):
        model = _auto_class(config).from_config(hf_config, trust_remote_code=False, dtype=torch.float32)
    if (directory / GENERATION_FILE).is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(directory)
    return model


def _call_factory(model: ModelConfig, processor: Processor, seed: int) -> nn.Module:
    assert model.factory is not None, "the model is not built by a factory"
    factory = import_attribute(model.factory, "model.factory")
    arguments = dict(model.config)
    if "processor" in inspect.signature(factory).parameters:
        arguments["processor"] = processor
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            built = factory(**arguments)
        except TypeError as error:
            shown = json.dumps(model.config, default=str)
            raise ConfigError(
                f"model.factory: {model.factory} does not take model.config {shown}: {error}"
            ) from error
    if not isinstance(built, nn.Module):
        raise ConfigError(
            f"model.factory: {model.factory} returned a {type(built).__name__}, not a torch.nn.Module"
        )
    return built


def is_on_meta(model: nn.Module) -> bool:
    """Whether a model still waits for memory."""
    return any(parameter.is_meta for parameter in model.parameters())
