"""Safetensors files, written as a stream: hashes and byte ranges are known when the last byte is.

The format: eight bytes with the header's length, the header in JSON, the tensors' bytes. The library writes from a
whole file in memory and tells no offsets; it reads what is written here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from eagleray.errors import StoreError
from eagleray.store.manifest import FileEntry, ShardEntry

Bytes = TypeVar("Bytes", bytes, memoryview)

_MIN_BLOCK_BYTES, _MAX_BLOCK_BYTES = 16 * 1024, 8 * 1024 * 1024
_BLOCKS_PER_FILE = 4096
_MAX_PANELS = 8
_PIECE_BYTES = 8 * 1024 * 1024
_DTYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8},
    **{"BOOL": torch.bool, "C64": torch.complex64},
    **{"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2},
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def dtype_name(dtype: torch.dtype) -> str:
    """Safetensors' name of a type.

    Raises:
        StoreError: Safetensors has no such type.
    """
    if dtype not in _NAMES:
        raise StoreError(f"tensors of type {dtype} cannot be stored", hint=f"Types: {', '.join(_DTYPES)}.")
    return _NAMES[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The type that safetensors calls `name`."""
    return _DTYPES[name]


def block_size(file_bytes: int) -> int:
    """Bytes of a block in a file of so many: small beside any rank's part, and few enough for the manifest.

    A block has one hash. A reader reads whole blocks, because only those can be verified.
    """
    return min(_MAX_BLOCK_BYTES, max(_MIN_BLOCK_BYTES, file_bytes // _BLOCKS_PER_FILE))


def as_array(tensor: torch.Tensor) -> NDArray[Any]:
    """View a tensor in host memory as an array of integers as wide as its elements, which is cut far faster."""
    return tensor.view(_INTEGERS[tensor.element_size()]).numpy()


def from_bytes(data: bytes | memoryview, dtype: str, sizes: Sequence[int]) -> torch.Tensor:
    """A tensor of its own memory from the bytes of a shard."""
    return torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).reshape(tuple(sizes))


@dataclass(frozen=True, slots=True)
class Piece:
    """What one rank writes of a tensor: a box that begins at `offsets`, in host memory."""

    name: str
    offsets: tuple[int, ...]
    shape: tuple[int, ...]
    local: torch.Tensor

    def panels(self, block_bytes: int) -> list[Piece]:
        """Cut a large matrix into panels of columns, each contiguous in the file: a layout may need some columns.

        There are about as many panels as blocks of rows in each, in powers of two as degrees mostly are.
        """
        num_panels = 1
        while (
            self.local.ndim > 1
            and num_panels < _MAX_PANELS
            and self.local.shape[1] % (2 * num_panels) == 0
            and self.local.nbytes >= block_bytes * (2 * num_panels) ** 2
        ):
            num_panels *= 2
        if num_panels == 1:
            return [self]
        width = self.local.shape[1] // num_panels
        columns = range(0, self.local.shape[1], width)
        row, column, *others = self.offsets
        return [
            Piece(self.name, (row, column + first, *others), self.shape, self.local[:, first : first + width])
            for first in columns
        ]

    @property
    def key(self) -> str:
        """The piece's name in the file: the tensor's, and where the piece begins unless it is whole."""
        if tuple(self.local.shape) == self.shape:
            return self.name
        return f"{self.name}[{','.join(map(str, self.offsets))}]"


@dataclass
class SafetensorsStream:
    """The bytes of a file that holds `pieces`; after they were taken, `file` and `shards` describe them.

    Args:
        path: `<attempt>/<file name>`.
        pieces: At least one, each of at least one element.
        block_bytes: Most bytes under one hash, unless a row has more; None: by the size of the file.
    """

    path: str
    pieces: Sequence[Piece]
    block_bytes: int | None = None
    shards: dict[str, list[ShardEntry]] = field(default_factory=dict, init=False)
    _hash: hashlib._Hash = field(default_factory=hashlib.sha256, init=False)
    _size: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._block_bytes = self.block_bytes or block_size(sum(piece.local.nbytes for piece in self.pieces))
        panels = [panel for piece in self.pieces for panel in piece.panels(self._block_bytes)]
        # Wide types first, so that every tensor is aligned to its element.
        self.pieces = sorted(panels, key=lambda piece: (-piece.local.element_size(), piece.key))
        self.header = _header(self.pieces)

    @property
    def file(self) -> FileEntry:
        """The file as it was written."""
        return FileEntry(path=self.path, size=self._size, sha256=self._hash.hexdigest())

    def __iter__(self) -> Iterator[bytes | memoryview]:
        yield self._count(self.header)
        for piece in self.pieces:
            for offset, block in _blocks(as_array(piece.local), self._block_bytes):
                yield from self._block(piece, offset, block)

    def _block(self, piece: Piece, row: int, block: NDArray[Any]) -> Iterator[memoryview]:
        start, data = self._size, block.reshape(-1).view(np.uint8).data
        for first in range(0, len(data), _PIECE_BYTES):
            part = data[first : first + _PIECE_BYTES]
            self._count(part)
            yield part
        offsets = (piece.offsets[0] + row, *piece.offsets[1:]) if piece.offsets else ()
        entry = ShardEntry.model_construct(  # our own numbers, and there are thousands: the reader checks them
            file=self.path,
            start=start,
            end=self._size,
            offsets=offsets,
            sizes=block.shape,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        self.shards.setdefault(piece.name, []).append(entry)

    def _count(self, part: Bytes) -> Bytes:
        self._hash.update(part)
        self._size += len(part)
        return part


def _header(pieces: Sequence[Piece]) -> bytes:
    entries: dict[str, object] = {}
    position = 0
    for piece in pieces:
        end = position + piece.local.numel() * piece.local.element_size()
        entries[piece.key] = {
            "dtype": dtype_name(piece.local.dtype),
            "shape": list(piece.local.shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _blocks(array: NDArray[Any], block_bytes: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Cut an array along its first dim into a power of two of blocks, as layouts do; yield where each begins."""
    if array.ndim == 0:
        yield 0, array
        return
    rows, num_blocks = array.shape[0], 1
    while num_blocks < rows and array.nbytes > block_bytes * num_blocks:
        num_blocks *= 2
    size = -(-rows // num_blocks)
    for first in range(0, rows, size):
        yield first, array[first : first + size]
