"""Signals to the driver."""

from __future__ import annotations

import os
import signal

import pytest

from eagleray_jobs.train.stopping import StopAtOnce, stop_signals


def test_the_first_signal_is_noted_and_the_second_ends_at_once() -> None:
    with stop_signals() as stop:
        stop.at_once = False
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(StopAtOnce) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert caught.value.signal_number == signal.SIGINT


def test_before_there_is_anything_to_commit_the_first_signal_ends_at_once() -> None:
    with pytest.raises(StopAtOnce), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)


def test_the_handlers_of_the_process_come_back() -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopAtOnce), stop_signals():
        os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
