"""Starter files: complete, commented, ready to run."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from eagleray.config.schema import BUILTIN_TASKS, IMPORT_PATH_PATTERN
from eagleray.errors import UsageError


def write_starter(path: Path, task: str) -> None:
    """Write a starter file for a task.

    Args:
        path: Where; the model is named after it.
        task: A built-in task, or the import path of your own.

    Raises:
        UsageError: The file exists, its folder does not, or the task is unknown.
    """
    text = starter(task, _model_name(path))
    try:
        with path.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError:
        raise UsageError(f"{path} exists already", "Name another file, or remove this one.") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}") from error


def starter(task: str, name: str) -> str:
    """Return the text of a starter file.

    Raises:
        UsageError: The task is unknown.
    """
    own = re.fullmatch(IMPORT_PATH_PATTERN, task) is not None
    if not own and task not in BUILTIN_TASKS:
        known = ", ".join(BUILTIN_TASKS)
        raise UsageError(f"there is no task {task}", f"Choose {known} or your own package.module:Task.")
    module = task.partition(":")[0]
    text = files(__package__).joinpath("starters", f"{'own' if own else task}.yaml").read_text(encoding="utf-8")
    return Template(text).substitute(name=name, task=task, module=module, package=f"./{module.partition('.')[0]}")


def _model_name(path: Path) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", path.stem.lower()).strip("._-")[:128] or "model"
