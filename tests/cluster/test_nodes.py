"""Workers on two nodes: a store that they do not share, and a node that dies."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from ray_cluster import RayCluster
from raylets import SLOT, can_hide_mounts, joined_node, kill_node
from train_runs import (
    LAST,
    CommandLine,
    FinishedRun,
    assert_bitwise_equal,
    await_commit,
    finish,
    metrics,
    weights,
    write_run,
)

ON_TWO_NODES = f"resources.resources_per_worker={{CPU: 0.5, {SLOT}: 1}}"
PATIENT = "resources.wait_s=60"


@pytest.mark.skipif(not can_hide_mounts(), reason="a node with mounts of its own needs the right to unshare them")
def test_a_store_that_two_nodes_do_not_share_is_found_before_the_first_step(
    ray_cluster: RayCluster, ray_environment: dict[str, str], command_line: CommandLine, tmp_path: Path
) -> None:
    file, store = write_run(tmp_path), tmp_path / "store"
    store.mkdir()
    call = ("train", file, ON_TWO_NODES, PATIENT, "--address", ray_cluster.address, "--store", store)
    with joined_node(ray_cluster.address, ray_environment, hidden=store):
        done = command_line.run(*call)
    assert (done.status, done.value["error"]["code"]) == (1, "store"), done.stderr
    assert f"the store {store} is not shared" in done.value["error"]["message"]
    assert metrics(store) == []
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(600)  # two nodes join, and the workers start twice
def test_a_node_that_dies_is_replaced_and_the_end_is_bitwise_the_same(
    ray_cluster: RayCluster,
    ray_environment: dict[str, str],
    command_line: CommandLine,
    undisturbed: FinishedRun,
    tmp_path: Path,
) -> None:
    file, store = write_run(tmp_path), tmp_path / "store"
    call = ("train", file, ON_TWO_NODES, PATIENT, "--address", ray_cluster.address, "--store", store)
    with joined_node(ray_cluster.address, ray_environment) as first, command_line.start(*call) as process:
        await_commit(store, random.choice((4, 8, 12)), process)
        kill_node(first)
        with joined_node(ray_cluster.address, ray_environment):
            done = finish(process)
    assert done.status == 0, done.stderr
    assert done.value["restarts"] >= 1
    assert_bitwise_equal(weights(store, LAST), undisturbed.weights)
