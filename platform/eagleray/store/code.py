"""The hash of the user's own code, for the records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path


def hash_code(directories: Sequence[str]) -> str | None:
    """Hash the Python files below directories, with their names there; None: there are none.

    Args:
        directories: Of the user's packages; where one lies does not count.
    """
    digest = hashlib.sha256()
    num_files = 0
    for directory in map(Path, directories):
        for path in sorted(directory.rglob("*.py")):
            name = path.relative_to(directory).as_posix().encode()
            digest.update(len(name).to_bytes(8, "little") + name + hashlib.sha256(path.read_bytes()).digest())
            num_files += 1
    return digest.hexdigest() if num_files else None
