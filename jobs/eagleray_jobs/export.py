"""`models export`: a version as a plain Hugging Face directory."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from eagleray.config.schema import ServeConfig
from eagleray.engine import load_engine
from eagleray.errors import UsageError
from eagleray.hub import without_progress_bars
from eagleray.models.base import BASE_FILE
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.registry import Registry
from eagleray_jobs.adapter_files import write_adapter
from eagleray_jobs.model_card import model_card

# The model writes its own; and what is written here needs no base.
_LEFT_OUT = {"config.json", "generation_config.json", BASE_FILE}


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote.

    Attributes:
        ref: Full reference of the version.
        directory: Where it is now.
        files: Names of the files.
        size_bytes: Their size together.
    """

    ref: str
    directory: str
    files: tuple[str, ...]
    size_bytes: int


def export_model(registry: Registry, ref: str, directory: str | Path) -> ExportReport:
    """Write a version as a directory that Hugging Face opens: config, safetensors, tokenizer and a model card.

    The weights are whole; an adapter that was trained also stands alone in the folder `adapter`, as peft opens it.
    The directory appears whole or not at all.

    Args:
        registry: The models of a store.
        ref: Which version.
        directory: Must not exist, or be empty.

    Raises:
        UsageError: The directory holds something, or the model is no Hugging Face model.
        NotFoundError: The reference stands for nothing.
        CheckpointDamagedError: A byte is not what was committed.
    """
    target = Path(directory).expanduser().absolute()
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise UsageError(f"{target} exists and is not an empty directory", "name a directory that does not exist")
    checkpoint = registry.open(ref)
    if checkpoint.config().model.factory is not None:
        raise UsageError(
            f"{checkpoint.ref} is a module of {checkpoint.config().model.factory}, which Hugging Face cannot open",
            "its weights are safetensors already; read them with Checkpoint.tensors()",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(checkpoint, partial)
        partial.chmod(0o777 & ~_umask())
        os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    files = sorted(path for path in target.rglob("*") if path.is_file())
    size_bytes = sum(path.stat().st_size for path in files)
    names = tuple(str(path.relative_to(target)) for path in files)
    return ExportReport(checkpoint.ref, str(target), names, size_bytes)


def _write(checkpoint: Checkpoint, directory: Path) -> None:
    model: Any = load_engine(checkpoint, serve=ServeConfig()).model
    with without_progress_bars():
        model.save_pretrained(directory)
    for name, data in checkpoint.files().items():
        if name not in _LEFT_OUT:
            (directory / name).write_bytes(data)
    if checkpoint.config().model.adapter is not None:
        write_adapter(checkpoint, model, directory / "adapter")
    (directory / "README.md").write_text(model_card(checkpoint), encoding="utf-8")


def _umask() -> int:
    """Return the process's umask, which can be read only by setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
