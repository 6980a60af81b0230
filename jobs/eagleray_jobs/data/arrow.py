"""Rows of features as Arrow files: written once, memory-mapped by whoever reads them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import ipc

from eagleray.errors import DataError
from eagleray.tasks.base import Features

LENGTH_COLUMN = "_length"
EXAMPLE_COLUMN = "_example"
_UNSIGNED_16_MAX = np.iinfo(np.uint16).max
_SIGNED_32_MAX = np.iinfo(np.int32).max

Reader = Callable[[int], Any]
"""Reads one value of a column."""


def write_rows(
    features: Sequence[Features], lengths: Sequence[int], examples: Sequence[Mapping[str, Any]]
) -> bytes:
    """Return rows as an Arrow file of one record batch.

    Args:
        features: What the model trains on: lists of int, numbers, str or bytes; the same keys in every row.
        lengths: Tokens of each row.
        examples: What the rows came from, for scores; bytes (images) are left out.
    """
    columns = {name: _narrow(pa.array([row[name] for row in features])) for name in features[0]}
    columns[LENGTH_COLUMN] = pa.array(lengths, pa.int32())
    columns[EXAMPLE_COLUMN] = pa.array([_plain(example) for example in examples], pa.large_string())
    batch = pa.RecordBatch.from_pydict(columns)
    sink = pa.BufferOutputStream()
    with ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return bytes(sink.getvalue())


class ArrowFile:
    """Memory-mapped rows: what is read stays in the page cache, which the system takes back when it needs to.

    Args:
        path: A file that `write_rows` made.

    Raises:
        DataError: It is none.
    """

    def __init__(self, path: Path) -> None:
        try:
            # The views below keep the mapping alive.
            self._batch = ipc.open_file(pa.memory_map(str(path))).get_batch(0)
        except (pa.ArrowInvalid, OSError) as error:
            raise DataError(
                f"{path} is no prepared data: {error}", "remove its folder and prepare again"
            ) from None
        self._readers = {name: _reader(self._batch.column(name)) for name in self._batch.schema.names}
        self._example = self._readers.pop(EXAMPLE_COLUMN)
        self.lengths: NDArray[np.int32] = self._batch.column(LENGTH_COLUMN).to_numpy()
        del self._readers[LENGTH_COLUMN]

    def __len__(self) -> int:
        return int(self._batch.num_rows)

    def features(self, index: int) -> Features:
        """Read the features of one row."""
        return {name: read(index) for name, read in self._readers.items()}

    def example(self, index: int) -> dict[str, Any]:
        """Read what one row came from."""
        values: dict[str, Any] = json.loads(self._example(index))
        return values


def _narrow(column: Any) -> Any:
    """Store integers in as few bytes as their values allow: half or a quarter of the disk and the page cache."""
    if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type):
        return column.cast(pa.list_(_narrowest(column.flatten())))
    if pa.types.is_integer(column.type) and not column.null_count:
        return column.cast(_narrowest(column))
    return column


def _narrowest(values: Any) -> Any:
    numbers = values.to_numpy(zero_copy_only=False) if len(values) else np.zeros(1, np.int64)
    low, high = int(numbers.min()), int(numbers.max())
    if low >= 0 and high <= _UNSIGNED_16_MAX:
        return pa.uint16()
    return pa.int32() if -_SIGNED_32_MAX <= low and high <= _SIGNED_32_MAX else pa.int64()


def _reader(column: Any) -> Reader:
    """Return how a value of a column is read: by NumPy views where they are faster than Arrow's scalars."""
    flat = (pa.types.is_integer, pa.types.is_floating)
    if not column.null_count and any(is_flat(column.type) for is_flat in flat):
        numbers = column.to_numpy()
        return lambda index: numbers[index].item()
    if pa.types.is_list(column.type) and pa.types.is_integer(column.type.value_type) and not column.null_count:
        offsets, values = column.offsets.to_numpy(), column.values.to_numpy()
        return lambda index: values[offsets[index] : offsets[index + 1]].tolist()
    return lambda index: column[index].as_py()


def _plain(example: Mapping[str, Any]) -> str:
    kept = {name: value for name, value in example.items() if not isinstance(value, bytes)}
    return json.dumps(kept, ensure_ascii=False, default=str)
