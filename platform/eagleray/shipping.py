"""What travels to a cluster: our own packages as an unpacked wheel, and the user's `code:` directories.

A wheel *file* in Ray's `py_modules` is installed by pip with its dependencies: every job would fetch ray and torch
again and shadow the cluster's. An unpacked wheel is only put on the path. Its dist-info travels too, because the
verbs of the command line are found through it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from eagleray.errors import ConfigError
from eagleray.user_code import python_paths

PACKAGES = ("eagleray", "eagleray_jobs", "eagleray_serving")
_IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", ".git", ".venv", "node_modules")


def _distribution() -> Distribution:
    try:
        return distribution("eagleray")
    except PackageNotFoundError as error:  # pragma: no cover - a broken installation
        raise ConfigError("eagleray is not installed: its package metadata is missing", "pip install .") from error


def unpack_wheel(target: Path) -> list[Path]:
    """Lay out our packages and their dist-info under `target`, one folder each, as a wheel holds them."""
    folders = []
    for package in PACKAGES:
        spec = find_spec(package)
        assert spec is not None and spec.submodule_search_locations is not None, package
        source = Path(next(iter(spec.submodule_search_locations)))
        folders.append(Path(shutil.copytree(source, target / package, ignore=_IGNORED)))
    folders.append(_copy_metadata(target))
    return folders


def _copy_metadata(target: Path) -> Path:
    dist = _distribution()
    folder = target / f"eagleray-{dist.version}.dist-info"
    folder.mkdir(parents=True)
    for name in ("METADATA", "WHEEL", "entry_points.txt", "top_level.txt"):
        text = dist.read_text(name)
        if text is not None:
            (folder / name).write_text(text)
    return folder


def code_modules(code: Sequence[str]) -> list[Path]:
    """Return the packages and modules of the user's `code:` directories, one entry for each.

    Raises:
        ConfigError: An entry is not a directory, or holds no Python module.
    """
    found: list[Path] = []
    for entry in code:
        directory = Path(entry).resolve()
        if python_paths([entry]) != [str(directory)]:
            found.append(directory)
            continue
        modules = sorted(path for path in directory.iterdir() if _is_module(path))
        if not modules:
            raise ConfigError(f"code: {directory} holds no Python package and no module")
        found.extend(modules)
    return found


def _is_module(path: Path) -> bool:
    if path.is_dir():
        return path.name.isidentifier() and any(path.glob("*.py"))
    return path.suffix == ".py" and path.stem.isidentifier() and path.name not in ("setup.py", "conftest.py")


def runtime_env(staging: Path, code: Sequence[str]) -> dict[str, Any]:
    """Return the Ray runtime environment that makes our packages and the user's importable on every node.

    Args:
        staging: An empty directory that lives until Ray has uploaded it.
        code: The user's `code:` directories.
    """
    modules = [*unpack_wheel(staging), *code_modules(code)]
    return {"py_modules": [str(path) for path in modules], "excludes": ["**/__pycache__/**", "**/.git/**"]}
