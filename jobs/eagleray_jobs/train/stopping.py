"""Ctrl-C and SIGTERM: the first asks the workers to commit and end, the second ends at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopAtOnce(BaseException):
    """A second signal: nothing more is waited for."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number


@dataclass
class StopSignal:
    """What signals have come.

    Attributes:
        number: The first signal, None before it.
        at_once: Whether a first signal already ends everything: nothing is there yet that could be committed.
    """

    number: int | None = None
    at_once: bool = True

    def receive(self, signal_number: int, _: FrameType | None) -> None:
        """Handle a signal.

        Raises:
            StopAtOnce: It is the second one, or there is nothing to commit yet.
        """
        if self.number is not None or self.at_once:
            for each in SIGNALS:  # a third one: no more patience, not even for clearing up
                signal.signal(each, lambda number, _: os._exit(128 + number))
            raise StopAtOnce(signal_number)
        self.number = signal_number


@contextmanager
def stop_signals() -> Iterator[StopSignal]:
    """Receive SIGINT and SIGTERM while the context is open (in the main thread; elsewhere none arrive)."""
    stop = StopSignal()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {each: signal.signal(each, stop.receive) for each in SIGNALS}
    try:
        yield stop
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
