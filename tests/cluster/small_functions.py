"""Functions for pools of actors: they double a number."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path

MakeDouble = Callable[[], Callable[[int], int]]


def dies_at(item: int, marker: Path | None) -> MakeDouble:
    """Make a function that doubles; its process is killed at one item, only once where there is a marker."""

    def make() -> Callable[[int], int]:
        def double(number: int) -> int:
            if number == item and not (marker is not None and marker.exists()):
                if marker is not None:
                    marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return 2 * number

        return double

    return make


def notes(path: Path, then: MakeDouble, sleeps_s: Mapping[int, float]) -> MakeDouble:
    """Make a function that writes down which items it begins, and takes long for some."""

    def make() -> Callable[[int], int]:
        double = then()

        def noted(number: int) -> int:
            with path.open("a") as file:
                file.write(f"{number}\n")
            time.sleep(sleeps_s.get(number, 0.02))
            return double(number)

        return noted

    return make


def begun(path: Path) -> list[int]:
    """Return the items that were begun so far."""
    return [int(line) for line in path.read_text().split()]
