"""A function on every item by a pool of actors, some of which die."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from ray_cluster import RayCluster

from eagleray.cluster import connect
from eagleray.errors import RunFailedError
from eagleray_jobs.ray_map import map_on_actors


def dies_at(item: int, marker: Path | None) -> Callable[[], Callable[[int], int]]:
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


def test_what_a_dead_actor_had_in_hand_is_done_again_without_a_line_on_the_terminal(
    ray_cluster: RayCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with connect(ray_cluster.address) as cluster:
        import ray.data  # noqa: F401  # it brings a log handler of its own

        cluster.quiet()
        make = dies_at(7, tmp_path / "died")
        results = list(map_on_actors(make, range(20), max_workers=2, num_cpus=0.5))
    assert (tmp_path / "died").exists()
    assert results == [2 * number for number in range(20)]
    assert capfd.readouterr().err == ""


def test_where_order_does_not_matter_a_slow_item_holds_nobody_up(ray_cluster: RayCluster) -> None:
    def make() -> Callable[[int], int]:
        def double(number: int) -> int:
            time.sleep(4 if number == 0 else 0.1)
            return 2 * number

        return double

    with connect(ray_cluster.address):
        results = list(map_on_actors(make, range(12), max_workers=2, num_cpus=0.5, in_order=False))
    assert sorted(results) == [2 * number for number in range(12)]
    assert results.index(0) >= 6


def test_an_item_that_kills_every_actor_ends_the_work_with_its_place(ray_cluster: RayCluster) -> None:
    with connect(ray_cluster.address), pytest.raises(RunFailedError, match="3 workers in a row died after 0 of 2"):
        list(map_on_actors(dies_at(0, None), range(2), max_workers=1, num_cpus=0.5))
