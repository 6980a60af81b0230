"""From the word in the file to the task."""

from __future__ import annotations

import inspect

from eagleray.config.builtin_tasks import BUILTIN_TASKS
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray.tasks.base import Task
from eagleray.user_code import import_attribute


def task_class(name: str) -> type[Task]:
    """Return the class of a task.

    Args:
        name: A built-in task or `package.module:Class`.

    Raises:
        ConfigError: It cannot be imported or is no concrete subclass of `Task`.
    """
    path = BUILTIN_TASKS[name].path if name in BUILTIN_TASKS else name
    found = import_attribute(path, "task")
    if not (inspect.isclass(found) and issubclass(found, Task)):
        raise ConfigError(
            f"task: {name} is {_describe(found)}, not a subclass of eagleray.tasks.Task",
            "name a class: `task: package.module:Class`",
        )
    if inspect.isabstract(found):
        missing = ", ".join(sorted(found.__abstractmethods__))
        raise ConfigError(f"task: {name} does not implement {missing}")
    return found


def load_task(config: RunConfig) -> Task:
    """Make the task of a file.

    Raises:
        ConfigError: The user's own task cannot be imported or is not a `Task`.
    """
    return task_class(config.task)(config)


def _describe(found: object) -> str:
    if inspect.isclass(found):
        return f"the class {found.__module__}.{found.__qualname__}"
    return f"a {type(found).__name__}"
