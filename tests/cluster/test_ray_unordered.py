"""A function on every item by a pool of actors with one item in hand each, some of which die."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from small_functions import begun, dies_at, notes

from eagleray.cluster import connect
from eagleray.errors import RunFailedError
from eagleray_jobs.ray_unordered import map_unordered


def test_a_slow_item_holds_nobody_up(ray_cluster: RayCluster, tmp_path: Path) -> None:
    make = notes(tmp_path / "begun", dies_at(-1, None), {0: 4.0})
    with connect(ray_cluster.address):
        results = list(map_unordered(make, range(12), max_workers=2, num_cpus=0.5))
    assert sorted(results) == [2 * number for number in range(12)]
    assert results.index(0) >= 6


def test_however_slow_the_caller_no_actor_begins_before_its_last_result_is_used(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    path = tmp_path / "begun"
    used = 0
    with connect(ray_cluster.address):
        for _ in map_unordered(notes(path, dies_at(-1, None), {}), range(12), max_workers=2, num_cpus=0.5):
            time.sleep(0.2)
            assert len(begun(path)) - used <= 2
            used += 1
    assert sorted(begun(path)) == list(range(12))


def test_when_an_actor_dies_only_its_own_item_is_done_again_without_a_line_on_the_terminal(
    ray_cluster: RayCluster, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "begun"
    # Long for the first: it is in hand elsewhere while an actor dies and another one takes its place.
    make = notes(path, dies_at(3, tmp_path / "died"), {0: 4.0})
    with connect(ray_cluster.address):
        results = list(map_unordered(make, range(12), max_workers=2, num_cpus=0.5))
    assert sorted(results) == [2 * number for number in range(12)]
    assert Counter(begun(path)) == Counter([*range(12), 3])
    assert capfd.readouterr().err == ""


def test_an_item_that_kills_every_actor_ends_the_work_after_all_others(ray_cluster: RayCluster) -> None:
    results = []
    with connect(ray_cluster.address), pytest.raises(RunFailedError, match="3 workers in a row died after 5 of 6"):
        for result in map_unordered(dies_at(0, None), range(6), max_workers=1, num_cpus=0.5):
            results.append(result)
    assert results == [2, 4, 6, 8, 10]


def test_more_actors_than_there_is_room_for_wait_and_hold_nothing_up(ray_cluster: RayCluster) -> None:
    with connect(ray_cluster.address):
        results = list(map_unordered(dies_at(-1, None), range(4), max_workers=4, num_cpus=5))
    assert sorted(results) == [0, 2, 4, 6]


def test_actors_end_when_the_caller_wants_no_more(ray_cluster: RayCluster, tmp_path: Path) -> None:
    make = notes(tmp_path / "begun", dies_at(-1, None), {1: 60.0})
    with connect(ray_cluster.address):
        results = map_unordered(make, range(12), max_workers=2, num_cpus=0.5)
        next(results)
        assert ray_cluster.find_processes("ray::_Worker")
        results.close()  # type: ignore[attr-defined]
        deadline = time.monotonic() + 20
        while ray_cluster.find_processes("ray::_Worker"):
            assert time.monotonic() < deadline
            time.sleep(0.1)
