"""Requests, errors and latency of a version, as numbers that can be added up over replicas. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

# Upper ends of the buckets, in seconds: from 0.1 ms to about 2 minutes in steps of a quarter.
BOUNDS_S = tuple(0.0001 * 1.25**step for step in range(63))


@dataclass(slots=True)
class Figures:
    """What became of the requests that a version answered.

    Attributes:
        requests: Requests that were answered or failed; one that the client gave up is in neither number.
        errors: Those in which the version failed.
        buckets: Requests by latency: at most `BOUNDS_S[i]`, and beyond all of them.
    """

    requests: int = 0
    errors: int = 0
    buckets: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS_S) + 1))

    def add(self, latency_s: float, *, is_error: bool) -> None:
        """Count a request."""
        self.requests += 1
        self.errors += is_error
        self.buckets[bisect_left(BOUNDS_S, latency_s)] += 1

    @property
    def error_rate(self) -> float:
        """Errors as a share of the requests; 0 where there were none."""
        return self.errors / self.requests if self.requests else 0.0

    def percentile_s(self, share: float) -> float | None:
        """Return the latency that a share of the requests stayed under, within a quarter; None: no requests.

        Args:
            share: 0.95 for p95.
        """
        rank = share * self.requests
        seen = 0
        for bound_s, count in zip((*BOUNDS_S, BOUNDS_S[-1]), self.buckets, strict=True):
            seen += count
            if count and seen >= rank:
                return bound_s
        return None

    def as_json(self) -> dict[str, Any]:
        """Return what `/v1/models` shows."""
        shown: dict[str, Any] = {"requests": self.requests, "errors": self.errors}
        for name, share in (("p50_ms", 0.5), ("p95_ms", 0.95)):
            latency_s = self.percentile_s(share)
            shown[name] = None if latency_s is None else float(f"{latency_s * 1000:.3g}")
        return shown


def total(parts: Iterable[Figures]) -> Figures:
    """Add figures of several replicas up."""
    summed = Figures()
    for part in parts:
        summed.requests += part.requests
        summed.errors += part.errors
        summed.buckets = [a + b for a, b in zip(summed.buckets, part.buckets, strict=True)]
    return summed
