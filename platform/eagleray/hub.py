"""Hugging Face checkpoints: a directory or a hub id, safetensors only, never code."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from eagleray.config.schema import ModelConfig
from eagleray.errors import ConfigError

# What is fetched from the hub. Pickles (.bin, .pt, .ckpt, .h5) and Python files stay there.
_HUB_FILES = ["*.safetensors", "*.json", "*.txt", "*.model", "*.spm", "*.bpe", "*.jinja"]
_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack"}


def locate_pretrained(model: ModelConfig) -> Path:
    """Return the directory of `model.pretrained`, fetched from the hub where it is a hub id.

    Raises:
        ConfigError: There is no such checkpoint, or its weights are no safetensors, or it needs code of its own.
    """
    assert model.pretrained is not None, "the model does not start from a pretrained one"
    directory = Path(model.pretrained).expanduser()
    if not directory.is_dir():
        directory = _fetch(model.pretrained, model.revision)
    check_directory(directory)
    return directory


def check_directory(directory: Path) -> None:
    """Check that a directory is a Hugging Face checkpoint that can be opened without running anything in it.

    Raises:
        ConfigError: It is not; the message says what was found.
    """
    config = read_model_config(directory)
    if "auto_map" in config:
        raise ConfigError(
            f"{directory}: config.json asks for Python code of the checkpoint (auto_map), which is never run",
            "install that code and use model.factory",
        )
    if any(directory.glob("*.safetensors")):
        return
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    found = f"its weights are {', '.join(pickles)}, which can run code when opened" if pickles else "it has none"
    raise ConfigError(
        f"{directory}: only weights in safetensors are opened; {found}",
        "convert them where you trust them: model.save_pretrained(directory)",
    )


def read_model_config(directory: Path) -> Mapping[str, Any]:
    """Return `config.json` of a checkpoint.

    Raises:
        ConfigError: There is none or it is no JSON object.
    """
    path = directory / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} is no Hugging Face checkpoint: there is no config.json in it")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is no JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} is no JSON object")
    return config


def hash_weights(directory: Path) -> str:
    """Return a SHA-256 of a checkpoint's weights: of the names and contents of its safetensors files."""
    return _hash_files(sorted(directory.glob("*.safetensors")))


def _hash_files(paths: Sequence[Path]) -> str:
    whole = hashlib.sha256()
    for path in paths:
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        whole.update(f"{path.name} {digest}\n".encode())
    return whole.hexdigest()


def hash_checkpoint(directory: Path) -> str:
    """Return a SHA-256 of everything that a model is made of from a checkpoint: weights, configs, tokenizer."""
    names = sorted({path.name for pattern in _HUB_FILES for path in directory.glob(pattern) if path.is_file()})
    return _hash_files([directory / name for name in names])


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """Keep transformers from drawing a bar for every file that it reads or writes."""
    from transformers.utils import logging

    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()


def _fetch(name: str, revision: str | None) -> Path:
    if not _HUB_ID.fullmatch(name) or name.startswith("."):
        raise ConfigError(f"model.pretrained: {name!r} is neither a directory that is there nor a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=_HUB_FILES))
    except Exception as error:
        raise ConfigError(
            f"model.pretrained: {name!r} is no directory, and the hub gave no such checkpoint: "
            f"{type(error).__name__}: {error}",
            "give a directory where there is no network",
        ) from error
