"""A rank that raises, and a rank that hangs, in every kind of layout: what the user reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import RankGroup
from training import Job, degrees_of, failure_of, make_config, train

from eagleray.config.layout import parse_layout
from eagleray_jobs.train.failures import RankFailure, find_fatal, merge

LAYOUTS = ["ddp2", "fsdp2", "tp2", "pp2", "hsdp2x2", "fsdp2.tp2", "pp2.ddp2", "pp2.tp2"]
TIMEOUT_S = 8.0
Failures = Callable[..., list[RankFailure]]


def sampled(names: set[str]) -> list[Any]:
    assert names <= set(LAYOUTS)
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture
def failures(tmp_path: Path) -> Iterator[Failures]:
    """`failures(layout, hang_at=(3, 1))`: what the ranks of a run post that ends so.

    The ranks are new ones: DTensor goes on using the groups of an equal mesh that it has seen, which a failure
    breaks. They have trained before, so that nobody is late but on purpose.
    """
    groups: list[RankGroup] = []

    def of(layout: str, **trouble: Any) -> list[RankFailure]:
        degrees = degrees_of(parse_layout(layout))
        groups.append(RankGroup(parse_layout(layout).num_workers))
        groups[-1].run(train, Job(make_config(layout=degrees, max_steps=1), str(tmp_path / "warm")))
        job = Job(make_config(layout=degrees, ddp_timeout=TIMEOUT_S), str(tmp_path / "run"), **trouble)
        found: list[tuple[RankFailure]] = groups[-1].run(failure_of, job, timeout_s=90.0)
        return [failure for (failure,) in found]

    yield of
    for group in groups:
        group.close()


@pytest.mark.parametrize("layout", sampled({"pp2"}))
def test_a_rank_that_raises_ends_the_run_with_its_traceback_once(failures: Failures, layout: str) -> None:
    found = failures(layout, raise_at=(3, 1))
    others = [failure.world_rank for failure in found if failure.lost_peer]
    assert others == [rank for rank in range(len(found)) if rank != 1], found[1].traceback
    assert find_fatal(found)
    message = str(merge(found))
    assert message.startswith("rank 1 raised ValueError: a column is missing\nTraceback")
    assert message.count("Traceback") == 1 and message.count("a column is missing") == 3
    names = "rank 0" if len(others) == 1 else "ranks 0, 2, 3"
    assert message.endswith(f"{names} only waited and lost the connection")


@pytest.mark.parametrize("layout", sampled({"fsdp2"}))
def test_a_rank_that_hangs_is_named_with_its_line_and_the_collectives_that_were_reached(
    failures: Failures, layout: str
) -> None:
    found = failures(layout, hang_at=(3, 1))
    # The rank that hung wakes up at last; a run under a driver has ended long before.
    posted = [failure for failure in found if failure.world_rank != 1]
    assert all(failure.lost_peer for failure in posted) and not find_fatal(posted)
    first, *ranks, hint = str(merge(posted)).split("\n")
    names = "rank 0" if len(posted) == 1 else "ranks 0, 2, 3"
    assert first == f"rank 1 did not come to a collective in which {names} waited"
    assert [line.partition(":")[0].strip() for line in ranks] == [f"rank {rank}" for rank in range(len(found))]
    hanging = ranks.pop(1)
    assert hanging.startswith("  rank 1: step 3, ") and hanging.endswith("in hang")
    assert " of group " in hanging and "(done)" in hanging
    for waiting in ranks:
        assert ": step 3, " in waiting and " of group " in waiting and "(waiting)" in waiting
    assert "train.ddp_timeout" in hint


@pytest.mark.slow
def test_a_rank_that_hangs_in_a_save_is_missed_as_soon_as_one_that_hangs_in_a_step(failures: Failures) -> None:
    waited, late = failures("ddp2", hang_in_save=1)
    first, waiting, hanging, _ = str(merge([waited])).split("\n")
    assert first == "rank 1 did not come to a collective in which rank 0 waited"
    assert waiting.startswith("  rank 0: end, all_reduce ") and "(waiting)" in waiting
    assert hanging.startswith("  rank 1: save of step 5, ") and hanging.endswith("in save")
    assert late.lost_peer
