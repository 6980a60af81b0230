"""Which items of a large request go together, and what becomes of a chunk whose replica died. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eagleray.config.serving import BulkConfig

# Without a tokenizer at hand: English has about 4.5 bytes to a token, CJK three bytes to one.
BYTES_PER_TOKEN = 4
# An image is not read as text: so many of its bytes weigh as much as a token.
BINARY_BYTES_PER_TOKEN = 1024
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
    chunk_items: int = 128
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


def cut(num_tokens: Sequence[int], limits: BulkLimits) -> list[Chunk]:
    """Cut items into chunks, in order."""
    chunks: list[Chunk] = []
    start = held = 0
    for index, count in enumerate(num_tokens):
        full = held + count > limits.chunk_tokens or index - start == limits.chunk_items
        if index > start and full:
            chunks.append(Chunk(start, index))
            start, held = index, 0
        held += count
    if num_tokens:
        chunks.append(Chunk(start, len(num_tokens)))
    return chunks


def is_large(items: Sequence[Any], bulk: BulkConfig) -> bool:
    """Whether a request is one for all replicas together; a single item cannot be."""
    if len(items) > bulk.min_items:
        return True
    return len(items) > 1 and sum(estimate_tokens(item) for item in items) > bulk.min_tokens
