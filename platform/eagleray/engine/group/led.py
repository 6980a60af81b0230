"""A group of ranks as one model: what an engine drives as if the weights were in its own process."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from eagleray.engine.decoder.cache import CacheShape, KeyValueCache
from eagleray.engine.decoder.packing import Packing
from eagleray.engine.group.commands import Admit, CacheUse, Forward, Generate, Step
from eagleray.engine.group.link import Link
from eagleray.engine.group.part import Change

CPU = torch.device("cpu")


class LedCache(KeyValueCache):
    """Which rows are in which slot; the keys and values are the ranks'.

    Args:
        key: How the ranks know it.
        num_beams: Hypotheses of a row.
        num_slots: Most rows at once.
    """

    def __init__(self, key: int, num_beams: int, num_slots: int) -> None:
        super().__init__(CacheShape(0, 1, 1, num_beams, num_slots), torch.float32, CPU)
        self.key = key
        self._changes: list[Change] = []

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Close the gaps that ended rows leave, here and with the next use on the ranks."""
        self._changes.append(("keep", list(kept)))
        return super().keep(kept)

    def reorder(self, parents_RK: Tensor) -> None:
        """Choose other parents, here and with the next use on the ranks."""
        self._changes.append(("reorder", parents_RK.tolist()))
        super().reorder(parents_RK)

    def use(self, dropped: Sequence[int]) -> CacheUse:
        """Return what ranks have to know before they use it."""
        changes, self._changes = self._changes, []
        return CacheUse(self.key, self.num_beams, self.num_slots, changes, dropped)


class LedNetwork:
    """A network whose layers are the ranks': a `Decoder`.

    Args:
        link: The way to the ranks.
    """

    device = CPU

    def __init__(self, link: Link) -> None:
        self._link = link
        self._keys = itertools.count()
        self._dropped: list[int] = []

    def make_cache(self, num_beams: int, num_slots: int) -> KeyValueCache:
        """Return an empty cache for so many rows."""
        cache = LedCache(next(self._keys), num_beams, num_slots)
        weakref.finalize(cache, self._dropped.append, cache.key)
        return cache

    def admit(self, sources: Sequence[Sequence[int]], cache: KeyValueCache) -> None:
        """Let the ranks encode rows, and let them into a cache."""
        assert isinstance(cache, LedCache)
        self._link.call(Admit(cache.use(self._take_dropped()), [list(source) for source in sources]))
        packing = Packing(sources, CPU)
        cache.join(torch.empty(0, 2, packing.num_rows, 1, packing.longest, 1), packing.lengths)

    def step(self, tokens_N: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the scores of the tokens that follow the last one of each hypothesis, shape (N, V)."""
        assert isinstance(cache, LedCache)
        found = self._link.call(Step(cache.use(self._take_dropped()), tokens_N.tolist()))
        parts = [torch.from_numpy(part) for part in found]
        cache.begin_column()
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _take_dropped(self) -> list[int]:
        dropped = list(self._dropped)
        del self._dropped[: len(dropped)]
        return dropped


class LedModel(nn.Module):
    """A model whose weights are the ranks'; called, all of them run it.

    Args:
        link: The way to the ranks.
    """

    def __init__(self, link: Link) -> None:
        super().__init__()
        self._link = link

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the whole model gives."""
        (output,) = self._link.call(Forward(args, kwargs))
        return output


class LedGeneratingModel(LedModel):
    """One that transformers decodes."""

    def generate(self, **kwargs: Any) -> Any:
        """Return the generated tokens."""
        (tokens_BT,) = self._link.call(Generate(kwargs))
        return tokens_BT
