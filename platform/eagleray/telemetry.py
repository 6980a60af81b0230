"""Logs that say which run and rank they come from, and a Ray that does not talk on the user's terminal.

Only the loggers of our own packages and of Ray are touched: a process that uses Eagleray as a library keeps its
root logger as it is.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

PACKAGES = ("eagleray", "eagleray_jobs", "eagleray_serving")
_FORMAT = "%(asctime)s %(levelname)s %(name)s%(origin)s: %(message)s"


class _Origin(logging.Filter):
    """Adds ` [run=en-fr rank=1]` to each record."""

    def __init__(self, fields: Mapping[str, object]) -> None:
        super().__init__()
        words = " ".join(f"{name}={value}" for name, value in fields.items() if value is not None)
        self._origin = f" [{words}]" if words else ""

    def filter(self, record: logging.LogRecord) -> bool:
        record.origin = self._origin
        return True


@contextmanager
def logging_to(stream: TextIO | None = None, *, verbose: bool = False, **fields: object) -> Iterator[None]:
    """Send the logs of our packages to a stream while the context is open.

    Args:
        stream: Where the lines go; standard error by default.
        verbose: Show INFO and DEBUG, not only warnings.
        **fields: Shown in every line: `run="en-fr"`, `rank=0`, `replica="a1"`. None is left out.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(logging.Formatter(_FORMAT))
    handler.addFilter(_Origin(fields))
    loggers = [logging.getLogger(name) for name in PACKAGES]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG if verbose else logging.WARNING)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


class RayLog:
    """Ray's log lines of this process, in a file instead of on the terminal.

    Ray gives several of its loggers a stream handler of their own, some when a module is imported: call `divert`
    again after such an import.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handler = logging.FileHandler(path, delay=True)
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._removed: list[tuple[logging.Logger, logging.Handler]] = []
        self._propagate: dict[logging.Logger, bool] = {}
        self._print: Any = None

    def divert(self) -> None:
        """Take every stream handler off Ray's loggers and write to the file instead."""
        self._divert_printed()
        logging.getLogger("ray")  # so that it exists below
        # A copy, made in one step: another thread may import something that brings loggers of its own.
        for name, logger in logging.root.manager.loggerDict.copy().items():
            if isinstance(logger, logging.Logger) and name.split(".")[0] == "ray":
                self._divert(logger)

    def _divert(self, logger: logging.Logger) -> None:
        streams = [
            h for h in logger.handlers if type(h) is logging.StreamHandler or "PlainRay" in type(h).__name__
        ]
        for handler in streams:
            logger.removeHandler(handler)
            self._removed.append((logger, handler))
        is_end = logger.name == "ray" or not logger.propagate
        if is_end and self._handler not in logger.handlers:
            logger.addHandler(self._handler)
            self._propagate.setdefault(logger, logger.propagate)
            logger.propagate = False

    def _divert_printed(self) -> None:
        """What a cluster tells every driver, such as the death of a node, is printed and not logged."""
        worker: Any = sys.modules.get("ray._private.worker")
        if worker is not None and self._print is None:
            self._print, worker.print_to_stdstream = worker.print_to_stdstream, self._log_printed

    def _log_printed(self, data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        logging.getLogger("ray").warning("(%s) %s", data.get("pid"), "\n".join(data["lines"]))

    def restore(self) -> None:
        """Give Ray's loggers back what was taken."""
        if self._print is not None:
            sys.modules["ray._private.worker"].print_to_stdstream = self._print  # type: ignore[attr-defined]
            self._print = None
        for logger, propagate in self._propagate.items():
            logger.removeHandler(self._handler)
            logger.propagate = propagate
        for logger, handler in self._removed:
            logger.addHandler(handler)
        self._handler.close()
