"""A function on every item by a pool of actors, some of which die."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray_cluster import RayCluster
from small_functions import dies_at

from eagleray.cluster import connect
from eagleray.errors import RunFailedError
from eagleray_jobs.ray_map import map_on_actors


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


def test_an_item_that_kills_every_actor_ends_the_work_with_its_place(ray_cluster: RayCluster) -> None:
    with connect(ray_cluster.address), pytest.raises(RunFailedError, match="3 workers in a row died after 0 of 2"):
        list(map_on_actors(dies_at(0, None), range(2), max_workers=1, num_cpus=0.5))
