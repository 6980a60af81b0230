"""Continuous batching: rows that have ended leave, rows that wait take their places.

Orca, Yu et al. 2022 (OSDI 22).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eagleray.engine.decoder.beam import BeamSearch
from eagleray.engine.decoder.cache import KeyValueCache
from eagleray.engine.decoder.greedy import Greedy
from eagleray.engine.decoder.network import Decoder
from eagleray.engine.decoder.rules import DecodingRules
from eagleray.engine.plan import BatchLimits

FREE_SHARE = 4
"""Rows are let in when one in so many slots is free: a few at a time would make many small encoder passes."""


@dataclass(frozen=True, slots=True)
class Decoded:
    """A row that has ended.

    Attributes:
        ticket: What `add` returned.
        tokens: What was generated, with the token that ended it.
    """

    ticket: int
    tokens: list[int]


class DecodingSession:
    """Decodes rows under one set of rules, as many at once as fit.

    Args:
        network: Computes.
        rules: How tokens are chosen.
        limits: Rows at once, and their source tokens, padding included.
    """

    def __init__(self, network: Decoder, rules: DecodingRules, limits: BatchLimits) -> None:
        self._network, self._rules, self._limits = network, rules, limits
        self._chooser: Any = BeamSearch(rules) if rules.num_beams > 1 else Greedy(rules)
        self._waiting: deque[tuple[int, Sequence[int]]] = deque()
        self._rows: list[Any] = []  # in the cache's slots
        self._num_tickets = 0
        self._tokens_N = torch.empty(0, dtype=torch.int64, device=network.device)
        self._cache: KeyValueCache | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._rows and not self._waiting

    def add(self, source: Sequence[int]) -> int:
        """Let a row wait for its turn; return the ticket by which its answer is known."""
        self._waiting.append((self._num_tickets, source))
        self._num_tickets += 1
        return self._num_tickets - 1

    def tokens(self, ticket: int) -> list[int]:
        """Return what a running row has generated so far; with beams, what its best hypothesis has.

        Raises:
            KeyError: No such row runs.
        """
        for row in self._rows:
            if row.ticket == ticket:
                return row.so_far()  # type: ignore[no-any-return]
        raise KeyError(ticket)

    def drop(self, tickets: Collection[int]) -> None:
        """Let rows go whose answers nobody waits for any more, waiting or running."""
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] not in tickets)
        for row in self._rows:
            row.is_done = row.is_done or row.ticket in tickets
        if self._cache is not None:
            self._release(self._cache)

    def step(self) -> list[Decoded]:
        """Give every running row one more token; return those that ended."""
        cache = self._schedule()
        if not self._rows:
            return []
        scores_NV = self._network.step(self._tokens_N, cache)
        return self._postprocess(scores_NV.float(), cache)

    def _schedule(self) -> KeyValueCache:
        """Let waiting rows in where there is room."""
        wanted = max(1, min(self._limits.max_items, len(self._waiting)))
        if self._cache is None or (not self._rows and self._cache.num_slots < wanted):
            self._cache = self._network.make_cache(self._rules.num_beams, wanted)
        num_slots = self._cache.num_slots
        if self._waiting and (not self._rows or (num_slots - len(self._rows)) * FREE_SHARE >= num_slots):
            if group := self._take(self._cache):
                self._admit(group, self._cache)
        return self._cache

    def _take(self, cache: KeyValueCache) -> list[tuple[int, Sequence[int]]]:
        longest, num_rows = cache.longest_source, len(self._rows)
        group: list[tuple[int, Sequence[int]]] = []
        while self._waiting and num_rows < cache.num_slots:
            num_rows, longest = num_rows + 1, max(longest, len(self._waiting[0][1]))
            if num_rows > 1 and not self._limits.fits(num_rows, longest):
                break
            group.append(self._waiting.popleft())
        return group

    def _admit(self, group: Sequence[tuple[int, Sequence[int]]], cache: KeyValueCache) -> None:
        self._network.admit([source for _, source in group], cache)
        self._rows += [self._chooser.open(ticket) for ticket, _ in group]
        starts = self._tokens_N.new_full((len(group) * self._rules.num_beams,), self._rules.start_token_id)
        self._tokens_N = torch.cat([self._tokens_N, starts])

    def _postprocess(self, scores_NV: Tensor, cache: KeyValueCache) -> list[Decoded]:
        """Choose the tokens and let go of the rows that ended."""
        self._tokens_N, parents_RK = self._chooser.choose(scores_NV, self._rows)
        if parents_RK is not None:
            cache.reorder(parents_RK)
        ended = [Decoded(row.ticket, row.best()) for row in self._rows if row.is_done]
        self._release(cache)
        return ended

    def _release(self, cache: KeyValueCache) -> None:
        """Close the gaps that ended rows leave."""
        kept = [slot for slot, row in enumerate(self._rows) if not row.is_done]
        if len(kept) == len(self._rows):
            return
        order = cache.keep(kept)
        self._rows = [self._rows[slot] for slot in order]
        self._tokens_N = self._tokens_N.view(-1, self._rules.num_beams)[order].flatten()
