"""An adapter alone, in the two files that the peft library opens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from eagleray.errors import CheckpointDamagedError
from eagleray.lora import is_factor, saved_modules
from eagleray.models.base import BASE_FILE, Base
from eagleray.store.checkpoint import Checkpoint
from eagleray.tasks import task_class

_TASK_TYPES = {"seq2seq-lm": "SEQ_2_SEQ_LM", "sequence-classification": "SEQ_CLS"}
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
    weights = {**checkpoint.tensors(), **checkpoint.tensors("adapter.")}
    saved = saved_modules(model, adapter)
    tensors = {
        f"{_PREFIX}{name}": tensor
        for name, tensor in weights.items()
        if is_factor(name) or any(name.startswith(f"{module}.") for module in saved)
    }
    targets = sorted({name.partition(".lora_")[0] for name in weights if is_factor(name)})
    if not targets:
        raise CheckpointDamagedError(f"{checkpoint.ref} holds no adapter")
    directory.mkdir()
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = _peft_config(checkpoint) | {"target_modules": targets, "modules_to_save": saved or None}
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True))


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
