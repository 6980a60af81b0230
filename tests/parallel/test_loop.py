"""The loop on real groups of processes: the number of workers does not show in the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from training import Job, Outcome, make_config, replace, train

Groups = Callable[[int], RankGroup]


def run(group: Groups, world_size: int, folder: Path, task: str, **keys: Any) -> list[Outcome]:
    config = make_config(task, layout=world_size, **keys)
    return group(world_size).run(train, Job(config, str(folder)))


@pytest.mark.parametrize("task", ["translation", "text-classification"])
def test_neither_workers_nor_accumulation_change_losses_and_parameters(
    group: Groups, tmp_path: Path, task: str
) -> None:
    one = run(group, 1, tmp_path / "1", task)[0]
    others = {
        "32 x 2": run(group, 2, tmp_path / "2", task),
        "16 x 2, accumulation 2": run(group, 2, tmp_path / "2a", task, per_device_train_batch_size=16),
    }
    assert sorted(one.losses) == [1, 2, 3, 4, 5]
    for name, ranks in others.items():
        assert ranks[0].losses == pytest.approx(one.losses, abs=1e-6), name
        for rank in ranks:
            torch.testing.assert_close(rank.tensors, one.tensors, rtol=0, atol=1e-6)
    assert [ranks[0].num_forwards for ranks in others.values()] == [5, 10]


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"data_parallel_shard_degree": 2},
    "tp2": {"tensor_parallel_degree": 2, "sequence_parallel": True},
    "fsdp2.tp2": {
        "data_parallel_shard_degree": 2,
        "tensor_parallel_degree": 2,
        "activation_checkpointing": "selective",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_neither_losses_nor_parameters_nor_what_is_saved_and_resumed(
    group: Groups, tmp_path: Path, layout: str
) -> None:
    keys = {"save_steps": 3, "eval_steps": 3}
    one = group(1).run(train, Job(make_config(**keys), str(tmp_path / "one"), num_validation=5))[0]
    config = make_config(layout=LAYOUTS[layout], **keys)
    job = Job(config, str(tmp_path / "cut"), num_validation=5)
    workers = 4 if layout == "fsdp2.tp2" else 2
    cut = group(workers).run(train, job)[0]
    assert cut.losses == pytest.approx(one.losses, abs=1e-6)
    assert cut.records[2].scores == pytest.approx(one.records[2].scores, abs=1e-6)
    torch.testing.assert_close(cut.tensors, one.tensors, rtol=0, atol=1e-5)
    for rank in group(1).run(train, replace(job, resume_step=3, config=make_config(**keys))):
        assert rank.losses == pytest.approx({step: one.losses[step] for step in (4, 5)}, abs=1e-6)
