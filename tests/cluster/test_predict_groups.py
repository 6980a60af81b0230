"""`predict` with a model that lies on two workers: the same bytes as with one."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray_cluster import RayCluster
from serving_models import commit, translation
from train_runs import CommandLine

LINES = [f"{day} July, a text of the {day * 3}" for day in range(1, 40)]


@pytest.mark.slow
@pytest.mark.parametrize("degree", ["tensor_parallel_degree", "pipeline_parallel_degree"])
def test_a_file_is_answered_as_by_one_worker(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path: Path, degree: str
) -> None:
    store, source = tmp_path / "store", tmp_path / "source.txt"
    source.write_text("\n".join(LINES) + "\n")
    each = {"resources": {"resources_per_worker": {"CPU": 0.5}}}
    commit({**translation("alone"), **each}, store)
    commit({**translation("pair", **{degree: 2}), **each}, store)
    for name in ("alone", "pair"):
        done = command_line.run(
            "predict", name, source, tmp_path / f"{name}.txt", "--store", store, "--address", ray_cluster.address
        )
        assert done.status == 0, done.stderr
    assert (tmp_path / "pair.txt").read_bytes() == (tmp_path / "alone.txt").read_bytes()
    assert len((tmp_path / "pair.txt").read_text().splitlines()) == len(LINES)
