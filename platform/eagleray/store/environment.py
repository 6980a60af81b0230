"""The versions of everything that computes a checkpoint, asked without importing any of it."""

from __future__ import annotations

import functools
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from platform import python_version

_PACKAGES = ("eagleray", "torch", "transformers", "tokenizers", "safetensors", "ray")


def environment_versions() -> dict[str, str]:
    """Return the version of Python and of each package that is installed."""
    return dict(_find_versions())


@functools.cache
def _find_versions() -> tuple[tuple[str, str], ...]:
    """Read them once in a process: packages are slow to be asked."""
    found = [("python", python_version())]
    for package in _PACKAGES:
        with suppress(PackageNotFoundError):
            found.append((package, version(package)))
    return tuple(found)
