"""The loop on real groups of processes: the number of workers does not show in the result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from training import Job, Outcome, make_config, train

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
