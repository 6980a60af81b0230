"""Which split an example belongs to: decided by its key, never by its place."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True, slots=True)
class SplitShares:
    """How much of the keys is held out; both are shares between 0 and 1."""

    validation: float
    test: float

    def of(self, key: str) -> Split:
        """Return the split of a key: the same on every machine, whatever the other keys are."""
        point = int.from_bytes(sha256(key.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64
        if point < self.test:
            return "test"
        return "validation" if point < self.test + self.validation else "train"
