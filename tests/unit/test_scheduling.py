"""Who gives way to whom on a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest

from eagleray.scheduling import come_first, give_way, giving_way

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have no batch threads")


def policy() -> int:
    return os.sched_getscheduler(0)


def policy_of_a_child() -> int:
    code = "import os; print(os.sched_getscheduler(0))"
    return int(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)


def test_what_is_started_meanwhile_gives_way_and_what_comes_later_does_not() -> None:
    with giving_way():
        assert (policy(), policy_of_a_child()) == (os.SCHED_BATCH, os.SCHED_BATCH)
    assert (policy(), policy_of_a_child()) == (os.SCHED_OTHER, os.SCHED_OTHER)


def test_a_thread_that_has_inherited_it_can_come_first_again() -> None:
    seen: list[int] = []

    def work() -> None:
        seen.append(policy())
        come_first()
        seen.append(policy())

    with giving_way():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert seen == [os.SCHED_BATCH, os.SCHED_OTHER]


def test_a_thread_gives_way_alone() -> None:
    thread = threading.Thread(target=give_way)
    thread.start()
    thread.join()
    assert policy() == os.SCHED_OTHER
