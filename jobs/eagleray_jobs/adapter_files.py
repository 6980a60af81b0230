"""An adapter alone, in the two files that the peft library opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from eagleray.errors import CheckpointDamagedError
from eagleray.lora import is_factor, saved_modules
from eagleray.models.base import BASE_FILE, Base
from eagleray.store.checkpoint import Checkpoint
from eagleray.tasks import task_class

_TASK_TYPES = {"seq2seq-lm": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS"}
_HEADS = ("classifier", "score")
"""What peft takes for the head of a classifier, whether or not the config names it."""
_PREFIX = "base_model.model."


def write_adapter(checkpoint: Checkpoint, model: nn.Module, directory: Path) -> None:
    """Write `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        checkpoint: A version that an adapter was trained for.
        model: Its model, without adapters.
        directory: Is made.

    Raises:
        CheckpointDamagedError: The version holds no adapter.
    """
    from safetensors.torch import save_file

    adapter = checkpoint.config().model.adapter
    assert adapter is not None
    stored = {**checkpoint.tensors(), **checkpoint.tensors("adapter.")}
    factors = {name: tensor for name, tensor in stored.items() if is_factor(name)}
    targets = sorted({name.partition(".lora_")[0] for name in factors})
    if not targets:
        raise CheckpointDamagedError(f"{checkpoint.ref} holds no adapter")
    config, saved = _peft_config(checkpoint), saved_modules(model, adapter)
    heads = _HEADS if config["task_type"] == "SEQ_CLS" else ()
    tensors = factors | _of_modules(model, (*saved, *heads), set(targets))
    directory.mkdir()
    named = {f"{_PREFIX}{name}": tensor.contiguous() for name, tensor in tensors.items()}
    save_file(named, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config |= {"target_modules": targets, "modules_to_save": saved or None}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


def _of_modules(model: nn.Module, ends: tuple[str, ...], targets: set[str]) -> dict[str, Tensor]:
    """Return the weights of the modules that peft takes for saved whole: all whose names end like that."""
    modules = {
        name: module for name, module in model.named_modules() if name.endswith(ends) and name not in targets
    }
    return {
        f"{name}.{key}": parameter.detach()
        for name, module in modules.items()
        for key, parameter in module.named_parameters()
    }


def _peft_config(checkpoint: Checkpoint) -> dict[str, Any]:
    config, files = checkpoint.config(), checkpoint.files()
    adapter = config.model.adapter
    assert adapter is not None
    return {
        "peft_type": "LORA",
        "task_type": _TASK_TYPES.get(task_class(config.task).head or ""),
        "base_model_name_or_path": Base.from_files(files, checkpoint.ref).source if BASE_FILE in files else None,
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "lora_dropout": adapter.dropout,
        "bias": "none",
        "inference_mode": True,
    }
