"""One long-lived group of processes per world size, shared by the whole tier."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from ranks import RankGroup, RankGroups


@pytest.fixture(scope="session")
def group() -> Iterator[Callable[[int], RankGroup]]:
    """`group(world_size).run(function, *args)` returns the result of every rank."""
    with RankGroups() as groups:
        yield groups
