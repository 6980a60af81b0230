"""When a refused request may come again: from the pace at which the queue is worked off."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from eagleray_serving.schema import WireError

SPAN_S = 10.0
STEP_S = 0.25
MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
# Longer than a chunk of a large request takes, shorter than a replica takes to start.
HELD_BACK_LIFE_S = 10.0


class DrainRate:
    """Tokens per second over the last seconds.

    Args:
        clock: Seconds, monotonic.
        span_s: Seconds that are looked back.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, span_s: float = SPAN_S) -> None:
        self._clock = clock
        self._span_s = span_s
        self._finished: deque[tuple[float, int]] = deque()
        self._num_tokens = 0

    def add(self, num_tokens: int) -> None:
        """Note that tokens were answered."""
        now = self._clock()
        self._num_tokens += num_tokens
        if self._finished and now - self._finished[-1][0] < STEP_S:
            start, before = self._finished.pop()
            self._finished.append((start, before + num_tokens))
        else:
            self._finished.append((now, num_tokens))
        self._forget(now)

    @property
    def tokens_per_s(self) -> float | None:
        """The pace; None where nothing was answered lately."""
        now = self._clock()
        self._forget(now)
        if not self._finished:
            return None
        return self._num_tokens / max(1.0, now - self._finished[0][0])

    def seconds_for(self, num_tokens: float) -> float:
        """Return the seconds after which so many tokens are worked off, within what a client can use."""
        pace = self.tokens_per_s
        if pace is None:
            return MIN_RETRY_S
        return min(MAX_RETRY_S, max(MIN_RETRY_S, num_tokens / pace))

    def _forget(self, now: float) -> None:
        while self._finished and now - self._finished[0][0] > self._span_s:
            self._num_tokens -= self._finished.popleft()[1]


class HeldBack:
    """Tokens of large requests that their sender holds back until there is room; forgotten when it falls silent.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, tuple[int, float]] = {}

    def tell(self, request_id: str, num_tokens: int) -> None:
        """Note what a request still holds back."""
        self._told[request_id] = (num_tokens, self._clock())

    @property
    def num_tokens(self) -> int:
        """Tokens that are held back now."""
        now = self._clock()
        self._told = {
            name: (count, at) for name, (count, at) in self._told.items() if count and now - at <= HELD_BACK_LIFE_S
        }
        return sum(count for count, _ in self._told.values())


def overloaded(message: str, retry_after_s: float) -> WireError:
    """Return the refusal of a request for which there is no room."""
    return WireError(
        429,
        "overloaded",
        message,
        "try again later, or raise serve.autoscaling_config.max_replicas",
        retry_after_s=retry_after_s,
    )
