"""Which items of a large request go together, how many, and what becomes of a chunk whose replica died. Pure."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eagleray.config.serving import BulkConfig

# Without a tokenizer at hand: English has about 4.5 bytes to a token, CJK three bytes to one.
BYTES_PER_TOKEN = 4
# An image is not read as text: so many of its bytes weigh as much as a token.
BINARY_BYTES_PER_TOKEN = 1024
# How long a replica should be at a chunk, and how large the first one is, when nobody knows how long that takes.
CHUNK_S = 0.25
FIRST_CHUNK_TOKENS = 512
MIN_CHUNK_TOKENS = 128
# Seconds of work after which what was measured counts half.
HALF_LIFE_S = 2.0
# Deaths after which a chunk is cut in halves and runs alone, and with which an item is at fault.
NUM_DEATHS_OF_SUSPECT = 2
NUM_DEATHS_OF_CULPRIT = 3


@dataclass(frozen=True, slots=True)
class BulkLimits:
    """How a request is cut and how long a chunk may take.

    Attributes:
        chunk_tokens: Estimated tokens of a chunk; a single item may be larger.
        chunk_items: Items of a chunk.
        call_timeout_s: Seconds after which a replica with a chunk counts as dead.
        patience_s: Seconds of refusals after which a chunk, and with it the request, is given up.
    """

    chunk_tokens: int = 4096
    chunk_items: int = 256
    call_timeout_s: float = 60.0
    patience_s: float = 300.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """Items `start` to `stop` of a request, and how many replicas died over them."""

    start: int
    stop: int
    num_deaths: int = 0

    @property
    def is_suspect(self) -> bool:
        """Whether it may kill replicas: then it runs alone."""
        return self.num_deaths >= NUM_DEATHS_OF_SUSPECT

    def after_death(self) -> tuple[Chunk, ...]:
        """Return what is to run next; nothing where the only item is at fault."""
        num_deaths = self.num_deaths + 1
        if num_deaths < NUM_DEATHS_OF_SUSPECT:
            return (replace(self, num_deaths=num_deaths),)
        if self.stop - self.start == 1:
            return () if num_deaths >= NUM_DEATHS_OF_CULPRIT else (replace(self, num_deaths=num_deaths),)
        middle = (self.start + self.stop) // 2
        return (Chunk(self.start, middle, num_deaths), Chunk(middle, self.stop, num_deaths))


def estimate_tokens(value: Any) -> int:
    """Estimate the tokens of an item from its characters; at least 1."""
    num_tokens = 1
    pending = [value]
    while pending:
        current = pending.pop()
        if isinstance(current, str):
            num_tokens += len(current.encode(errors="replace")) // BYTES_PER_TOKEN
        elif isinstance(current, bytes):
            num_tokens += len(current) // BINARY_BYTES_PER_TOKEN
        elif isinstance(current, Mapping):
            pending.extend(current.values())
        elif isinstance(current, list):
            pending.extend(current)
    return num_tokens


def split_off(
    chunk: Chunk, tokens_before: Sequence[int], max_tokens: float, max_items: int
) -> tuple[Chunk, Chunk | None]:
    """Return as much of a chunk's beginning as the limits allow, at least one item, and what is left of it.

    Args:
        chunk: Items that nothing has happened to yet.
        tokens_before: Of each item of the request, the tokens of those before it; at last those of all.
        max_tokens: Most tokens of the beginning.
        max_items: Most items of it.
    """
    most = tokens_before[chunk.start] + max_tokens
    fitting = bisect_right(tokens_before, most, chunk.start, chunk.stop + 1) - 1
    stop = min(chunk.stop, chunk.start + max_items, max(chunk.start + 1, fitting))
    return replace(chunk, stop=stop), replace(chunk, start=stop) if stop < chunk.stop else None


class Pace:
    """How fast a replica answers chunks, and so how large they should be.

    Small enough that a slow model answers one in good time, and large enough that asking costs little beside
    answering. The last ones shrink with what is left, so that replicas end together, as in guided self-scheduling
    (Polychronopoulos and Kuck 1987, IEEE Transactions on Computers 36).

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._since = clock()
        self._num_tokens = self._seconds = 0.0

    def begin(self) -> None:
        """Note that chunks are in flight again: the time before that was nobody's."""
        self._since = self._clock()

    def add(self, num_tokens: float) -> None:
        """Note that a replica's share of an answered chunk was so many tokens."""
        now = self._clock()
        elapsed_s, self._since = now - self._since, now
        kept = 0.5 ** (elapsed_s / HALF_LIFE_S)
        self._num_tokens = self._num_tokens * kept + num_tokens
        self._seconds = self._seconds * kept + elapsed_s

    def chunk_tokens(self, num_left: int, num_replicas: int) -> float:
        """Return the tokens of the next chunk, of a request with so many tokens left."""
        wanted = float(FIRST_CHUNK_TOKENS)
        if self._seconds > 0:
            wanted = self._num_tokens / self._seconds * CHUNK_S
        return max(MIN_CHUNK_TOKENS, min(wanted, num_left / (2 * num_replicas)))


def is_large(items: Sequence[Any], bulk: BulkConfig) -> bool:
    """Whether a request is one for all replicas together; a single item cannot be."""
    if len(items) > bulk.min_items:
        return True
    return len(items) > 1 and sum(estimate_tokens(item) for item in items) > bulk.min_tokens
