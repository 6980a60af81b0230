"""Tokens a second per key: a bucket for each key in every process that requests enter by.

A request enters by a replica of its model, or by the edge. Each keeps a bucket per key that fills with its share
of the key's rate: a replica with the rate divided by the number of replicas of its model that run now, the edge
with all of it. A request is let in while the bucket of its key holds anything, and is charged what it took once
that is known: its tokens, counted by the model's own tokenizer. A large request leaves a debt, which is paid back
first. What enters by the edge is charged there and on the replicas that do the work, so that both ways together
give a key no more than its rate in the long run.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from eagleray_serving.keys import ApiKey
from eagleray_serving.schema import WireError

# Seconds of a rate that a bucket holds: what a key may use at once after a pause.
BURST_S = 10.0


@dataclass(slots=True)
class TokenBucket:
    """Tokens that a key may use now; below zero it is in debt.

    Attributes:
        level: Tokens in it.
        filled: When it was last filled.
    """

    level: float
    filled: float

    def fill(self, rate: float, now: float) -> None:
        """Add what came in since the last time."""
        self.level = min(self.level + rate * (now - self.filled), rate * BURST_S)
        self.filled = now


class Rates:
    """The buckets of one process.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_sharers = 1
        self._clock = clock
        self._buckets: dict[str, TokenBucket] = {}

    def admit(self, key: ApiKey | None) -> None:
        """Let a request in while its key has tokens left.

        Raises:
            WireError: 429, with the seconds until it has.
        """
        if key is None or key.tokens_per_s is None:
            return
        rate = key.tokens_per_s / self.num_sharers
        bucket = self._filled(key.name, rate)
        if bucket.level <= 0:
            raise WireError(
                429,
                "rate_limited",
                f"the key {key.name} has used its {key.tokens_per_s:g} tokens a second",
                "wait, or ask for a key with a higher rate",
                retry_after_s=max(1.0, -bucket.level / rate),
            )

    def charge(self, key: ApiKey | None, num_tokens: int) -> None:
        """Take what a request took."""
        if key is not None and key.tokens_per_s is not None:
            self._filled(key.name, key.tokens_per_s / self.num_sharers).level -= num_tokens

    def _filled(self, name: str, rate: float) -> TokenBucket:
        now = self._clock()
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = TokenBucket(rate * BURST_S, now)
        bucket.fill(rate, now)
        return bucket
