"""Which items make a batch. Pure: lengths in, indices out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """What one batch may hold; a single item may be larger and is then alone.

    Attributes:
        max_items: Rows.
        max_tokens: Rows times the longest of them: tokens, padding included.
    """

    max_items: int = 64
    max_tokens: int = 8192

    def fits(self, num_items: int, longest: int) -> bool:
        """Whether a batch of so many items, padded to the longest, is within the limits."""
        return num_items <= self.max_items and num_items * longest <= self.max_tokens


def cut_batches(lengths: Sequence[int], limits: BatchLimits) -> list[list[int]]:
    """Cut items into batches of similar length.

    Args:
        lengths: Tokens of each item.
        limits: What a batch may hold.

    Returns:
        Indices, each once, longest first, so that a batch that does not fit into memory is met at once. Equal
        lengths keep their order, so that the batches depend on the items alone.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches and limits.fits(len(batches[-1]) + 1, lengths[batches[-1][0]]):
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches


def choose_batch(lengths: Sequence[int], groups: Sequence[int], limits: BatchLimits) -> list[int]:
    """Choose the items of the next batch among those that wait.

    The first item is always taken, so that none waits for ever. Then come the items of the lowest group, those
    nearest to it in length first, so that little is padded; then those of the next group.

    Args:
        lengths: Tokens of each waiting item, in the order of their arrival; the first one leads.
        groups: Rank of each item; lower ones come first.
        limits: What a batch may hold.

    Returns:
        Indices, in no particular order but with 0 in front.
    """
    chosen, longest = [0], lengths[0]
    candidates = range(1, len(lengths))
    for index in sorted(candidates, key=lambda i: (groups[i], abs(lengths[i] - lengths[0]), i)):
        if len(chosen) >= limits.max_items:
            break
        if limits.fits(len(chosen) + 1, max(longest, lengths[index])):
            chosen.append(index)
            longest = max(longest, lengths[index])
    return chosen
