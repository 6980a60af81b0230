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

_Waiting = tuple[int, Sequence[int]]
"""Ticket and source of a row that has not begun."""

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
        num_slots: Rows to have room for from the start; default: as many as wait at the first step.
    """

    def __init__(
        self, network: Decoder, rules: DecodingRules, limits: BatchLimits, num_slots: int | None = None
    ) -> None:
        self._network, self._rules, self._limits, self._num_slots = network, rules, limits, num_slots
        self._chooser: Any = BeamSearch(rules) if rules.num_beams > 1 else Greedy(rules)
        self._waiting: deque[_Waiting] = deque()
        self._urgent: deque[_Waiting] = deque()
        self._rows: list[Any] = []  # in the cache's slots
        self._num_tickets = 0
        self._tokens_N = torch.empty(0, dtype=torch.int64, device=network.device)
        self._cache: KeyValueCache | None = None

    @property
    def is_idle(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._rows and not self._waiting and not self._urgent

    def add(self, source: Sequence[int], *, at_once: bool = False) -> int:
        """Let a row wait for its turn.

        Args:
            source: Its tokens.
            at_once: It begins before the others that wait, as soon as one slot is free.

        Returns:
            The ticket by which its answer is known.
        """
        queue = self._urgent if at_once else self._waiting
        queue.append((self._num_tickets, source))
        self._num_tickets += 1
        return self._num_tickets - 1

    def tokens_so_far(self, ticket: int) -> list[int] | None:
        """Return what a row has generated so far; None: it has not begun, or decodes beams, which change."""
        for row in self._rows:
            if row.ticket == ticket and self._rules.num_beams == 1:
                return row.so_far()  # type: ignore[no-any-return]
        return None

    def drop(self, tickets: Collection[int]) -> None:
        """Let rows go whose answers nobody waits for any more, waiting or running."""
        if not tickets:
            return
        self._waiting = deque(waiting for waiting in self._waiting if waiting[0] not in tickets)
        self._urgent = deque(waiting for waiting in self._urgent if waiting[0] not in tickets)
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
        wanted = self._num_slots or max(1, min(self._limits.max_items, len(self._waiting) + len(self._urgent)))
        if self._cache is None or (not self._rows and self._cache.num_slots < wanted):
            self._cache = self._network.make_cache(self._rules.num_beams, wanted)
        num_slots = self._cache.num_slots
        num_free = num_slots - len(self._rows)
        if self._urgent or (self._waiting and (not self._rows or num_free * FREE_SHARE >= num_slots)):
            if group := self._take(self._cache):
                self._admit(group, self._cache)
        return self._cache

    def _take(self, cache: KeyValueCache) -> list[_Waiting]:
        longest, num_rows = cache.longest_source, len(self._rows)
        group: list[_Waiting] = []
        while (queue := self._urgent or self._waiting) and num_rows < cache.num_slots:
            num_rows, longest = num_rows + 1, max(longest, len(queue[0][1]))
            if num_rows > 1 and not self._limits.fits(num_rows, longest):
                break
            group.append(queue.popleft())
        return group

    def _admit(self, group: Sequence[_Waiting], cache: KeyValueCache) -> None:
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
