"""A committed version, opened: every byte is verified before it is used.

Whoever looks at it without its tensors does without torch, which takes seconds to be imported.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from eagleray.config.schema import RunConfig
from eagleray.errors import CheckpointDamagedError, EaglerayError, NotFoundError, StoreError
from eagleray.store.manifest import (
    CONFIG_FILE,
    MANIFEST_FILE,
    MODEL_PREFIX,
    STATE_FILE,
    FileEntry,
    Manifest,
    version_dir,
)
from eagleray.store.objects import ObjectStore
from eagleray.store.versions import read_manifest

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

_READ_BYTES = 16 * 1024 * 1024
_HINT = "Use another version, or restore the file."


class ProblemKind(StrEnum):
    """What is wrong with a file."""

    MISSING = "missing"
    TRUNCATED = "truncated"
    CHANGED = "changed"
    UNNAMED = "unnamed"


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that `verify` found.

    Attributes:
        kind: What is wrong.
        key: The file, as a key of the store.
        message: For the user.
    """

    kind: ProblemKind
    key: str
    message: str

    @property
    def is_damage(self) -> bool:
        """Whether the version cannot be used; a file that no manifest names lies there unopened."""
        return self.kind is not ProblemKind.UNNAMED


class Checkpoint:
    """A committed version.

    Attributes:
        store: Where it is.
        manifest: What it consists of.
    """

    def __init__(self, store: ObjectStore, manifest: Manifest) -> None:
        self.store = store
        self.manifest = manifest

    @classmethod
    def open(cls, store: ObjectStore, name: str, version: str) -> Checkpoint:
        """Open a version by its full name.

        Raises:
            NotFoundError: It was never committed, or was deleted.
            CheckpointDamagedError: Its manifest was changed.
        """
        return cls(store, read_manifest(store, name, version))

    @property
    def version(self) -> str:
        """`r2-step-00001200`."""
        return self.manifest.version

    @property
    def ref(self) -> str:
        """`en-fr@r2-step-00001200`."""
        return f"{self.manifest.name}@{self.version}"

    @property
    def base(self) -> str:
        """The prefix of its objects."""
        return version_dir(self.manifest.name, self.version)

    def config(self) -> RunConfig:
        """The file that trained it.

        Raises:
            CheckpointDamagedError: The stored file was changed.
        """
        return RunConfig.model_validate_json(self._read(CONFIG_FILE))

    def state(self) -> dict[str, Any]:
        """What the training needs to go on: step, examples consumed, schedule, scores.

        Raises:
            CheckpointDamagedError: The stored file was changed.
        """
        state: dict[str, Any] = json.loads(self._read(STATE_FILE))
        return state

    def files(self) -> dict[str, bytes]:
        """Everything that is neither tensors nor state nor our own config, by file name.

        Raises:
            CheckpointDamagedError: A stored file was changed.
        """
        ours = {CONFIG_FILE, STATE_FILE}
        names = [entry.name for entry in self.manifest.files if entry.name not in ours]
        return {name: self._read(name) for name in names if not name.endswith(".safetensors")}

    def tensors(self, prefix: str = MODEL_PREFIX) -> dict[str, torch.Tensor]:
        """Read tensors whole, in one process.

        Args:
            prefix: Of their names; it is removed from them.

        Raises:
            CheckpointDamagedError: A byte is not what was committed.
        """
        import torch

        from eagleray.store.dcp import StoreReader
        from eagleray.store.safetensors import dtype_of

        reader = StoreReader(self.store, self.manifest)
        entries = [tensor for tensor in self.manifest.tensors if tensor.name.startswith(prefix)]
        whole = {entry.name: torch.empty(entry.shape, dtype=dtype_of(entry.dtype)) for entry in entries}
        stored = ((entry, shard) for entry in entries for shard in entry.shards)
        for tensor, shard, data in reader.read(stored):
            box = tuple(slice(o, o + n) for o, n in zip(shard.offsets, shard.sizes, strict=True))
            whole[tensor.name][box] = data
        return {name.removeprefix(prefix): tensor for name, tensor in whole.items()}

    def load_into(
        self, tensors: Mapping[str, torch.Tensor], process_group: dist.ProcessGroup | None = None
    ) -> int:
        """Fill tensors in place; each rank reads only the blocks that its part needs, and verifies them.

        Collective where `torch.distributed` is initialised: a rank that fails makes all of them fail.

        Args:
            tensors: By their names in the checkpoint, of the same shapes; DTensors in any layout. Another type is
                converted.
            process_group: The ranks that load together; None: all.

        Returns:
            The bytes that this rank read.

        Raises:
            CheckpointDamagedError: A byte is not what was committed.
            StoreError: A tensor is not in the checkpoint, or has another shape; or another rank failed.
        """
        from eagleray.store.dcp import StoreReader, load_local

        reader = StoreReader(self.store, self.manifest)
        error: Exception | None = None
        try:
            self._check_shapes(tensors)
            load_local(tensors, reader)
        except EaglerayError as raised:
            error = raised
        _agree(error, process_group)
        return reader.num_bytes_read

    def verify(self) -> list[Problem]:
        """Read every file and return what is wrong with it, and every file that the manifest does not name."""
        problems = [problem for entry in self.manifest.files if (problem := self._verify_file(entry))]
        named = {f"{self.base}/{entry.path}" for entry in self.manifest.files} | {f"{self.base}/{MANIFEST_FILE}"}
        for info in self.store.list(self.base):
            if info.key not in named:
                message = f"{info.key} ({info.size} bytes) is not part of the version; it is never opened"
                problems.append(Problem(ProblemKind.UNNAMED, info.key, message))
        return problems

    def _verify_file(self, entry: FileEntry) -> Problem | None:
        key = f"{self.base}/{entry.path}"
        try:
            size, sha256 = self._hash(key)
        except NotFoundError:
            return Problem(ProblemKind.MISSING, key, f"{key} is missing")
        if size != entry.size:
            return Problem(ProblemKind.TRUNCATED, key, f"{key} has {size} bytes, {entry.size} were committed")
        if sha256 != entry.sha256:
            return Problem(ProblemKind.CHANGED, key, f"{key} was changed: its SHA-256 is {sha256}")
        return None

    def _hash(self, key: str) -> tuple[int, str]:
        size, digest = self.store.size(key), hashlib.sha256()
        for start in range(0, size, _READ_BYTES):
            digest.update(self.store.get_range(key, start, min(size, start + _READ_BYTES)))
        return size, digest.hexdigest()

    def _read(self, name: str) -> bytes:
        entry = next((entry for entry in self.manifest.files if entry.name == name), None)
        if entry is None:
            raise NotFoundError(f"{self.ref} has no {name}")
        key = f"{self.base}/{entry.path}"
        try:
            data = self.store.get(key)
        except NotFoundError:
            raise CheckpointDamagedError(f"{key} is missing", hint=_HINT) from None
        if len(data) != entry.size or hashlib.sha256(data).hexdigest() != entry.sha256:
            raise CheckpointDamagedError(
                f"{key} is damaged: its bytes are not those that were committed", hint=_HINT
            )
        return data

    def _check_shapes(self, tensors: Mapping[str, torch.Tensor]) -> None:
        stored = {tensor.name: tensor for tensor in self.manifest.tensors}
        for name, tensor in tensors.items():
            if name not in stored:
                raise StoreError(f"{self.ref} has no tensor {name}", hint="It was written by another model.")
            if tuple(tensor.shape) != stored[name].shape:
                raise StoreError(
                    f"{name} has shape {tuple(tensor.shape)}, in {self.ref} it has {stored[name].shape}",
                    hint="It was written by another model.",
                )


def _agree(error: Exception | None, process_group: dist.ProcessGroup | None) -> None:
    import torch.distributed as dist

    errors = [error]
    if dist.is_available() and dist.is_initialized():
        errors = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(errors, error, group=process_group)
    failed = {rank: found for rank, found in enumerate(errors) if found is not None}
    if error is not None:
        raise error
    if failed:
        rank, other = next(iter(failed.items()))
        raise type(other)(f"rank {rank}: {getattr(other, 'message', other)}", getattr(other, "hint", None))
