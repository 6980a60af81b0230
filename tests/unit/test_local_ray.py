"""Starting Ray on this machine: once more after a start that timed out, and only then."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, field
from typing import Any

import pytest

from eagleray.local_ray import ENVIRONMENT, start_local_ray


@dataclass
class FakeRay:
    """`ray.init` that fails as it is told, each time after starting a process."""

    failures: list[str]
    calls: list[dict[str, Any]] = field(default_factory=list)
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def init(self, **options: Any) -> None:
        self.calls.append(options)
        self.processes.append(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        if len(self.calls) <= len(self.failures):
            raise Exception(self.failures[len(self.calls) - 1])

    def end(self) -> list[bool]:
        """End what runs, and say of each process whether it did."""
        running = [process.poll() is None for process in self.processes]
        for process in self.processes:
            process.kill()
            process.wait(10)
        return running


def test_a_start_that_timed_out_is_tried_once_more_without_what_it_left() -> None:
    ray = FakeRay(["The current node timed out during startup."])
    start_local_ray(ray.init, num_cpus=2)
    assert ray.calls == [{"address": "local", "num_cpus": 2}] * 2
    assert ray.end() == [False, True]


@pytest.mark.parametrize(
    ("failures", "num_calls"),
    [(["The current node timed out"] * 2, 2), (["port 6379 is taken", "port 6379 is taken"], 1)],
)
def test_another_failure_and_a_second_one_are_raised(failures: list[str], num_calls: int) -> None:
    ray = FakeRay(failures)
    with pytest.raises(Exception, match=failures[0]):
        start_local_ray(ray.init)
    assert len(ray.calls) == num_calls
    ray.end()


def test_what_the_user_has_set_for_ray_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ENVIRONMENT:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_worker_niceness", "10")
    ray = FakeRay([])
    start_local_ray(ray.init)
    ray.end()
    assert {name: os.environ.pop(name) for name in ENVIRONMENT} == {**ENVIRONMENT, "RAY_worker_niceness": "10"}
