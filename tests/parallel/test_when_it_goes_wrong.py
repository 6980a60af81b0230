"""A rank that raises, and a rank that hangs, in every kind of layout: what the user reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ranks import RankGroup
from training import Job, failure_of, make_config, train

from eagleray_jobs.train.failures import RankFailure, find_fatal, merge

LAYOUTS: dict[str, dict[str, Any]] = {
    "ddp2": {"data_parallel_replicate_degree": 2},
    "fsdp2": {"data_parallel_shard_degree": 2},
    "tp2": {"tensor_parallel_degree": 2},
    "pp2": {"pipeline_parallel_degree": 2},
}
TIMEOUT_S = 8.0


def sampled(names: set[str]) -> list[Any]:
    assert names <= LAYOUTS.keys()
    return [pytest.param(name, marks=() if name in names else pytest.mark.slow) for name in LAYOUTS]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Two ranks of this module's own, which have imported everything: nobody is late but on purpose."""
    group = RankGroup(2)
    group.run(train, Job(make_config(layout=2, max_steps=1), str(tmp_path_factory.mktemp("warm"))))
    yield group
    group.close()


def failures(pair: RankGroup, folder: Path, layout: str, **trouble: tuple[int, int]) -> list[RankFailure]:
    config = make_config(layout=LAYOUTS[layout], ddp_timeout=TIMEOUT_S)
    found: list[tuple[RankFailure]] = pair.run(failure_of, Job(config, str(folder), **trouble), timeout_s=90.0)
    return [failure for (failure,) in found]


@pytest.mark.parametrize("layout", sampled({"pp2"}))
def test_a_rank_that_raises_ends_the_run_with_its_traceback_once(
    pair: RankGroup, tmp_path: Path, layout: str
) -> None:
    found = failures(pair, tmp_path, layout, raise_at=(3, 1))
    assert [failure.lost_peer for failure in found] == [True, False], found[1].traceback
    assert find_fatal(found)
    message = str(merge(found))
    assert message.startswith("rank 1 raised ValueError: a column is missing\nTraceback")
    assert message.count("Traceback") == 1 and message.count("a column is missing") == 3
    assert message.endswith("rank 0 only waited and lost the connection")


@pytest.mark.parametrize("layout", sampled({"fsdp2"}))
def test_a_rank_that_hangs_is_named_with_its_line_and_the_collectives_that_were_reached(
    pair: RankGroup, tmp_path: Path, layout: str
) -> None:
    found = failures(pair, tmp_path, layout, hang_at=(3, 1))
    # The rank that hung wakes up at last; a run under a driver has ended long before.
    assert found[0].lost_peer and not find_fatal(found[:1])
    message = str(merge(found[:1]))
    first, waiting, hanging = message.split("\n")[:3]
    assert first == "rank 1 did not come to a collective in which rank 0 waited"
    assert waiting.startswith("  rank 0: step 3, ") and "(waiting)" in waiting
    assert hanging.startswith("  rank 1: step 3, ") and hanging.endswith("in hang")
    assert " of group " in waiting and " of group " in hanging
    assert "train.ddp_timeout" in message
