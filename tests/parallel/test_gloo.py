"""Groups that share one event loop."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import RankGroup

from eagleray.gloo import new_group

NUM_GROUPS = 8


def _num_loops() -> int:
    tasks = Path("/proc/self/task").iterdir()
    return sum((task / "comm").read_text().startswith("gloo_tcp_loop") for task in tasks)


def reduce_in_many_groups() -> tuple[list[float], int]:
    """All-reduce in several new groups at once; returns the sums and the event loops that they added."""
    new_group(timeout_s=20)  # the first one brings the loop
    before = _num_loops()
    groups = [new_group(timeout_s=20) for _ in range(NUM_GROUPS)]
    values = [torch.full((1000,), float(number + dist.get_rank())) for number in range(NUM_GROUPS)]
    works = [
        dist.all_reduce(value, group=group, async_op=True) for value, group in zip(values, groups, strict=True)
    ]
    for work in works:
        assert work is not None
        work.wait()
    added = _num_loops() - before
    for group in groups:
        dist.destroy_process_group(group)
    return [float(value[0]) for value in values], added


def test_groups_add_no_event_loop_and_do_not_mix(group: Callable[[int], RankGroup]) -> None:
    for sums, added in group(2).run(reduce_in_many_groups):
        assert sums == [2.0 * number + 1.0 for number in range(NUM_GROUPS)]
        assert added == 0
