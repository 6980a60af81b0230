"""What an adapter stands on: weights that its checkpoints do not hold."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Protocol

from torch import Tensor

from eagleray.config.schema import RunConfig
from eagleray.errors import CheckpointDamagedError, ConfigError
from eagleray.hub import hash_weights, locate_pretrained
from eagleray.lora import merged
from eagleray.models.build import open_pretrained, stored_tensors
from eagleray.tasks import task_class

BASE_FILE = "eagleray_base.json"


class OpenedCheckpoint(Protocol):
    """What is read of a committed version."""

    @property
    def ref(self) -> str:
        """Its full reference."""

    def config(self) -> RunConfig:
        """The file of its run."""

    def files(self) -> dict[str, bytes]:
        """What stands beside the weights."""

    def tensors(self) -> dict[str, Tensor]:
        """The weights, under the model's own names."""


@dataclass(frozen=True, slots=True)
class Base:
    """The weights that an adapter was trained on.

    Attributes:
        source: `model.pretrained` of the file, or the full reference of the version that `train.init_from` named.
        sha256: Of the pretrained weights, or of the version's manifest.
    """

    source: str
    sha256: str

    def to_files(self) -> dict[str, bytes]:
        """Return the file that names them in a checkpoint."""
        return {BASE_FILE: json.dumps(asdict(self), indent=2, sort_keys=True).encode()}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], ref: str) -> Base:
        """Read them back.

        Raises:
            CheckpointDamagedError: The checkpoint does not name them.
        """
        if BASE_FILE not in files:
            raise CheckpointDamagedError(f"{ref} holds an adapter and no {BASE_FILE}, which names its base")
        return cls(**json.loads(files[BASE_FILE]))


def pretrained_base(config: RunConfig) -> Base:
    """Return what an adapter of `model.pretrained` stands on; reads all of its weights.

    Raises:
        ConfigError: It cannot be found or opened safely.
    """
    assert config.model.pretrained is not None
    return Base(config.model.pretrained, hash_weights(locate_pretrained(config.model)))


def whole_weights(checkpoint: OpenedCheckpoint) -> dict[str, Tensor]:
    """Read the weights of a version; an adapter that was committed alone is added to its base.

    Raises:
        ConfigError: The base is not where the file says, or is another one.
        CheckpointDamagedError: A byte is not what was committed.
    """
    tensors, config = checkpoint.tensors(), checkpoint.config()
    adapter = config.model.adapter
    if adapter is None or adapter.commit == "merged":
        return tensors
    files = checkpoint.files()
    base = Base.from_files(files, checkpoint.ref)
    try:
        found = pretrained_base(config)
    except ConfigError as error:
        raise ConfigError(
            f"{checkpoint.ref} holds an adapter alone, and its base cannot be opened: {error.message}",
            "bring the base there, or train with model.adapter.commit: merged",
        ) from error
    if found.sha256 != base.sha256:
        raise ConfigError(
            f"{checkpoint.ref} holds an adapter of weights with SHA-256 {base.sha256}, but those of {base.source} "
            f"have {found.sha256}",
            "bring the weights back that it was trained on",
        )
    model, _ = open_pretrained(config, task_class(config.task)(config).load_processor(files))
    return merged({**stored_tensors(model), **tensors}, adapter.scale)
