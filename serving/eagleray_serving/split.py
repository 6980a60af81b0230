"""Which version answers a request: by a hash of its id, so that its retry meets the same one. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

_HASH_BYTES = 8


@dataclass(frozen=True, slots=True)
class Split:
    """How requests are divided between versions.

    Attributes:
        current: The version that answers.
        canary: The version that answers a part of the requests; None: there is none.
        percent: That part.
    """

    current: str
    canary: str | None = None
    percent: float = 0.0

    def choose(self, request_id: str) -> str:
        """Return the version that answers a request; the same for the same id, on every replica."""
        if self.canary is not None and position(request_id) * 100 < self.percent:
            return self.canary
        return self.current


def position(request_id: str) -> float:
    """Return where a request stands between 0 and 1; ids are spread evenly, and a larger canary keeps its own."""
    digest = hashlib.sha256(request_id.encode()).digest()[:_HASH_BYTES]
    return int.from_bytes(digest) / float(1 << 8 * _HASH_BYTES)
