"""The user's own code: finding it and importing from it."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from eagleray.errors import ConfigError


def python_paths(code: Iterable[str]) -> list[str]:
    """Return what has to be on `sys.path` for the directories under `code:`.

    A directory that is a package (it holds `__init__.py`) is imported by its own name, so its parent counts;
    any other directory holds modules and packages, so it counts itself.

    Args:
        code: Directories; relative ones are relative to the working directory.

    Raises:
        ConfigError: An entry is not a directory.
    """
    paths: list[str] = []
    for entry in code:
        directory = Path(entry).resolve()
        if not directory.is_dir():
            raise ConfigError(
                f"code: {entry!r} is not a directory (looked for {directory})",
                "name directories of your own packages, relative to the file",
            )
        path = str(directory.parent if (directory / "__init__.py").exists() else directory)
        if path not in paths:
            paths.append(path)
    return paths


def add_code(code: Iterable[str]) -> None:
    """Put the directories under `code:` in front of `sys.path` of this process, once.

    Raises:
        ConfigError: An entry is not a directory.
    """
    new = [path for path in python_paths(code) if path not in sys.path]
    sys.path[:0] = new
    importlib.invalidate_caches()


def import_attribute(path: str, key: str) -> Any:
    """Import `package.module:name`.

    Args:
        path: The import path.
        key: The key of the file that holds it, for the message.

    Raises:
        ConfigError: The module cannot be imported, or has no such name.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise ConfigError(
            f"{key}: {path}: cannot import {module_name}: {type(error).__name__}: {error}",
            "the directory that holds it must be installed or stand under `code:`",
        ) from error
    if not hasattr(module, name):
        names = [other for other in vars(module) if not other.startswith("_")]
        near = get_close_matches(name, names, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has: {', '.join(sorted(names)) or 'nothing'}"
        raise ConfigError(f"{key}: {path}: {module.__file__ or module_name} has no {name}", hint)
    return getattr(module, name)
