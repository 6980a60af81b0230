"""Prepared data, as workers read it: memory-mapped, from the store itself or from a copy on this machine."""

from __future__ import annotations

import fcntl
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from itertools import accumulate
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from eagleray.errors import DataError, NotFoundError
from eagleray.store.objects import ObjectStore
from eagleray.tasks.base import Features
from eagleray_jobs.data.arrow import ArrowFile
from eagleray_jobs.data.manifest import DataManifest, DataSummary, PreparedFile, manifest_key
from eagleray_jobs.data.split import Split

CACHE_VARIABLE = "EAGLERAY_CACHE"
COPY_BYTES = 16 * 1024 * 1024


class PreparedData:
    """What a preparation wrote.

    Args:
        store: The store that holds it.
        fingerprint: Which one: the folder `data/<fingerprint>/`.
        cache_dir: Where copies from an object store are kept; default: `EAGLERAY_CACHE`, else
            `~/.cache/eagleray`.

    Raises:
        DataError: There is no such data, or its manifest is damaged.
    """

    def __init__(self, store: ObjectStore, fingerprint: str, *, cache_dir: Path | None = None) -> None:
        self.store = store
        self.fingerprint = fingerprint
        self._cache_dir = cache_dir or _default_cache_dir()
        try:
            self.manifest = DataManifest.from_json(store.get(manifest_key(fingerprint)))
        except NotFoundError:
            raise DataError(f"{store.location} holds no prepared data {fingerprint}", "prepare it again") from None

    @property
    def summary(self) -> DataSummary:
        """How many rows there are, and what was skipped and cut."""
        return self.manifest.summary

    @property
    def processor_files(self) -> dict[str, bytes]:
        """Files of the processor that the rows were encoded with.

        Raises:
            DataError: A file is damaged.
        """
        return {name: self._get(file) for name, file in self.manifest.processor.items()}

    def split(self, name: Split) -> Dataset:
        """Open a split; one without rows is empty.

        Raises:
            DataError: A file is missing or damaged.
        """
        return Dataset([ArrowFile(self._path(file)) for file in self.manifest.splits[name]])

    def _get(self, file: PreparedFile) -> bytes:
        data = self.store.get(file.key)
        _check(file, len(data), sha256(data).hexdigest(), self.store.location)
        return data

    def _path(self, file: PreparedFile) -> Path:
        """Return where a file lies on this machine, and copy it here if it lies in an object store."""
        path = self.store.local_path(file.key)
        if path is None:
            return _copy(self.store, file, self._cache_dir)
        if not path.exists() or path.stat().st_size != file.size:
            raise DataError(f"{path} is missing or not {file.size} bytes long", "prepare the data again")
        return path


class Dataset:
    """The rows of one split, in the order of the source."""

    def __init__(self, files: Sequence[ArrowFile]) -> None:
        self._files = files
        self._ends = list(accumulate(len(file) for file in files))
        parts = [file.lengths for file in files] or [np.empty(0, np.int32)]
        self.lengths: NDArray[np.integer] = np.concatenate(parts)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Features:
        file, row = self._find(index)
        return file.features(row)

    def __iter__(self) -> Iterator[Features]:
        return (self[index] for index in range(len(self)))

    def example(self, index: int) -> dict[str, Any]:
        """Return the columns that a row came from, with its `key` and, where there is one, its `kind`."""
        file, row = self._find(index)
        return file.example(row)

    def _find(self, index: int) -> tuple[ArrowFile, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        return self._files[number], index - (self._ends[number - 1] if number else 0)


def _default_cache_dir() -> Path:
    given = os.environ.get(CACHE_VARIABLE)
    return Path(given) if given else Path.home() / ".cache" / "eagleray"


def _copy(store: ObjectStore, file: PreparedFile, cache_dir: Path) -> Path:
    """Copy a file to this machine, once for all of its workers, and verify it.

    A copy is named by its hash and appears whole, so that what is there is right.
    """
    path = cache_dir / "data" / f"{file.sha256}.arrow"
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():
        return path
    with _locked(path.with_suffix(".lock")):
        if not path.exists():
            _download(store, file, path)
    return path


def _download(store: ObjectStore, file: PreparedFile, path: Path) -> None:
    digest = sha256()
    with NamedTemporaryFile(dir=path.parent, prefix=f"{path.name}.", delete=False) as staging:
        try:
            for start in range(0, file.size, COPY_BYTES):
                part = store.get_range(file.key, start, min(start + COPY_BYTES, file.size))
                digest.update(part)
                staging.write(part)
            staging.flush()
            _check(file, staging.tell(), digest.hexdigest(), store.location)
            os.replace(staging.name, path)
        except BaseException:
            os.unlink(staging.name)
            raise


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    # The system releases the lock of a process that dies, and a download ends by the store's own timeouts.
    with open(path, "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _check(file: PreparedFile, size: int, digest: str, location: str) -> None:
    if (size, digest) != (file.size, file.sha256):
        raise DataError(
            f"{location}: {file.key} is damaged: {size} bytes with SHA-256 {digest[:12]}..., the manifest says "
            f"{file.size} with {file.sha256[:12]}...",
            "remove its folder and prepare the data again",
        )
