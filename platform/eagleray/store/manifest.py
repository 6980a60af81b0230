"""What a version consists of: the record whose existence is the commit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from datetime import datetime
from math import prod
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from eagleray.config.schema import NAME_PATTERN
from eagleray.errors import CheckpointDamagedError

FORMAT: Final = 1
MANIFEST_FILE = "manifest.json"
CONFIG_FILE = "eagleray.json"
STATE_FILE = "state.json"
MODEL_PREFIX = "model."
OPTIM_PREFIX = "optim."

DTYPE_BYTES: Final = {
    **{"F64": 8, "I64": 8, "U64": 8, "C64": 8},
    **{"F32": 4, "I32": 4, "U32": 4},
    **{"F16": 2, "BF16": 2, "I16": 2, "U16": 2},
    **{"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}
"""Bytes of one element, by safetensors' name of the type."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
FilePath = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}/[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]
Extent = tuple[NonNegativeInt, ...]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class FileEntry(_Record):
    """A file of the version: `<attempt>/<file name>`, its bytes and their hash."""

    path: FilePath
    size: NonNegativeInt
    sha256: Sha256

    @classmethod
    def of(cls, path: str, data: bytes) -> FileEntry:
        """Describe a file by its bytes."""
        return cls(path=path, size=len(data), sha256=hashlib.sha256(data).hexdigest())

    @property
    def name(self) -> str:
        """The file's name without its attempt."""
        return self.path.rsplit("/", 1)[-1]


class ShardEntry(_Record):
    """A block of a tensor: where it begins in the tensor, its extent, and the bytes of a file that hold it."""

    file: FilePath
    start: NonNegativeInt
    end: NonNegativeInt
    offsets: Extent
    sizes: Extent
    sha256: Sha256


class TensorEntry(_Record):
    """A tensor of the version and the shards that cover it."""

    name: Annotated[str, Field(pattern=r"^(model|adapter|optim)\.\S+$", max_length=1024)]
    dtype: Annotated[str, Field(pattern=f"^({'|'.join(DTYPE_BYTES)})$")]
    shape: Extent
    shards: tuple[ShardEntry, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the whole tensor."""
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


class Manifest(_Record):
    """The commit of a version.

    Attributes:
        name: The model's name.
        version: `r2-step-00001200`.
        metrics: Scores of the evaluation at this step; None where one was not finite.
        best_metric: The score that `best` goes by, and whether greater is better.
        layout: How the run that wrote it was cut.
        versions: Of everything that computed it.
        code_sha256: Hash of the user's own code.
    """

    format: Literal[1] = FORMAT
    name: Annotated[str, Field(pattern=f"^{NAME_PATTERN}$")]
    run: PositiveInt
    step: NonNegativeInt
    epoch: NonNegativeInt
    attempt: str
    created: str
    layout: str
    metrics: dict[str, float | None]
    best_metric: tuple[str, bool] | None
    versions: dict[str, str]
    code_sha256: Sha256 | None
    files: tuple[FileEntry, ...]
    tensors: tuple[TensorEntry, ...]

    @property
    def version(self) -> str:
        """The version's name: its run and its step."""
        return version_name(self.run, self.step)

    @property
    def size_bytes(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON of everything else."""
        return hashlib.sha256(self._unsigned()).hexdigest()

    def created_at(self) -> datetime:
        """When it was committed."""
        return datetime.fromisoformat(self.created)

    def to_bytes(self) -> bytes:
        """The manifest as it is stored, its hash included."""
        # Spelt once, since it names every block: the hash goes where the sorted keys have it.
        text = self._unsigned()
        position = text.index(b',"step":', text.rindex(b',"run":'))
        return b'%b,"sha256":"%b"%b' % (
            text[:position],
            hashlib.sha256(text).hexdigest().encode(),
            text[position:],
        )

    def _unsigned(self) -> bytes:
        return canonical_json(self.model_dump(mode="json"))


def version_name(run: int, step: int) -> str:
    """The name of a version: `r2-step-00001200`."""
    return f"r{run}-step-{step:08d}"


def version_dir(name: str, version: str) -> str:
    """The prefix of a version's objects."""
    return f"models/{name}/{version}"


def manifest_key(name: str, version: str) -> str:
    """The key of a version's manifest."""
    return f"{version_dir(name, version)}/{MANIFEST_FILE}"


def canonical_json(value: Any) -> bytes:
    """The one spelling of a JSON value: sorted keys, no spaces, ASCII, finite numbers.

    Raises:
        ValueError: A number is not finite.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def parse_manifest(data: bytes, where: str) -> Manifest:
    """Read a manifest and refuse it unless every byte is as it was written and every tensor is covered once.

    Args:
        data: The stored bytes.
        where: What messages call the file.

    Raises:
        CheckpointDamagedError: The manifest was changed, or describes no whole version.
    """
    try:
        record = json.loads(data)
        claimed = record.pop("sha256")
        manifest = Manifest.model_validate_json(json.dumps(record))
    except (ValueError, KeyError, AttributeError, TypeError, ValidationError, RecursionError) as error:
        raise CheckpointDamagedError(f"{where} is not a manifest: {str(error).splitlines()[0]}") from None
    if claimed != manifest.sha256 or data != manifest.to_bytes():
        raise CheckpointDamagedError(f"{where} was changed after it was written: its hash is {manifest.sha256}")
    problem = coverage_problem(manifest)
    if problem is not None:
        raise CheckpointDamagedError(f"{where} does not describe a whole version: {problem}")
    return manifest


def coverage_problem(manifest: Manifest) -> str | None:
    """Say why the shards do not cover every element of every tensor exactly once; None: they do."""
    sizes = {file.path: file.size for file in manifest.files}
    if len(sizes) < len(manifest.files):
        return "a file is named twice"
    if len({tensor.name for tensor in manifest.tensors}) < len(manifest.tensors):
        return "a tensor is named twice"
    for tensor in manifest.tensors:
        problem = _shard_problem(tensor, sizes) or _cover_problem(tensor)
        if problem is not None:
            return f"{tensor.name}: {problem}"
    return None


def _shard_problem(tensor: TensorEntry, file_sizes: dict[str, int]) -> str | None:
    for shard in tensor.shards:
        if len(shard.offsets) != len(tensor.shape) or len(shard.sizes) != len(tensor.shape):
            return f"a shard has {len(shard.sizes)} dimensions, the tensor {len(tensor.shape)}"
        ends = [offset + size for offset, size in zip(shard.offsets, shard.sizes, strict=True)]
        if any(end > extent for end, extent in zip(ends, tensor.shape, strict=True)):
            return f"a shard ends at {tuple(ends)}, the tensor at {tensor.shape}"
        if shard.end - shard.start != prod(shard.sizes) * DTYPE_BYTES[tensor.dtype]:
            return f"a shard of {shard.sizes} has {shard.end - shard.start} bytes"
        if shard.end > file_sizes.get(shard.file, -1):
            return f"a shard ends at byte {shard.end} of {shard.file}, which has {file_sizes.get(shard.file, 0)}"
    return None


def _cover_problem(tensor: TensorEntry) -> str | None:
    covered = sum(prod(shard.sizes) for shard in tensor.shards)
    if covered != prod(tensor.shape):
        return f"its shards hold {covered} elements, the tensor {prod(tensor.shape)}"
    # In the order of their first rows only neighbours can overlap.
    ordered = sorted(tensor.shards, key=lambda shard: shard.offsets)
    for index, shard in enumerate(ordered):
        for other in ordered[index + 1 :]:
            if tensor.shape and other.offsets[0] >= shard.offsets[0] + shard.sizes[0]:
                break
            if _overlap(shard.offsets, shard.sizes, other.offsets, other.sizes):
                return f"shards at {shard.offsets} and {other.offsets} overlap"
    return None


def _overlap(
    offsets: Sequence[int], sizes: Sequence[int], other_offsets: Sequence[int], other_sizes: Sequence[int]
) -> bool:
    axes = zip(offsets, sizes, other_offsets, other_sizes, strict=True)
    return all(a < b + b_size and b < a + a_size for a, a_size, b, b_size in axes)
