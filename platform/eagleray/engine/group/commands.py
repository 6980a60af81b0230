"""What every rank of a group is told to do, in the same order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eagleray.engine.group.part import Change, Part


class Command(Protocol):
    """One call of the whole model; crosses processes."""

    def run(self, part: Part) -> Any:
        """Do this rank's share; return what it has to say about the result, None: nothing."""
        ...


@dataclass(frozen=True, slots=True)
class CacheUse:
    """Which cache a step or an admission uses, and what ranks have to know of it before.

    Attributes:
        key: The cache.
        num_beams: Hypotheses of a row.
        num_slots: Most rows at once.
        changes: What happened to its rows since its last use.
        dropped: Caches that are used no more.
    """

    key: int
    num_beams: int
    num_slots: int
    changes: Sequence[Change]
    dropped: Sequence[int]


@dataclass(frozen=True, slots=True)
class Admit:
    """Encode rows and let them into a cache."""

    cache: CacheUse
    sources: Sequence[Sequence[int]]

    def run(self, part: Part) -> None:
        """Do this rank's share."""
        assert part.network is not None
        part.network.drop(self.cache.dropped)
        part.network.change(self.cache.key, self.cache.changes)
        part.network.admit(self.cache.key, self.cache.num_beams, self.cache.num_slots, self.sources)


@dataclass(frozen=True, slots=True)
class Step:
    """Give every running row one more token."""

    cache: CacheUse
    tokens: Sequence[int]

    def run(self, part: Part) -> Any:
        """Return this rank's part of the scores."""
        assert part.network is not None
        part.network.drop(self.cache.dropped)
        part.network.change(self.cache.key, self.cache.changes)
        return part.network.step(self.cache.key, self.tokens)


@dataclass(frozen=True, slots=True)
class Forward:
    """Call the model."""

    args: Sequence[Any]
    kwargs: Mapping[str, Any]

    def run(self, part: Part) -> Any:
        """Return its output."""
        return part.forward(self.args, self.kwargs)


@dataclass(frozen=True, slots=True)
class Generate:
    """Let transformers generate."""

    kwargs: Mapping[str, Any]

    def run(self, part: Part) -> Any:
        """Return its tokens."""
        return part.generate(self.kwargs)
