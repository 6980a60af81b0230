"""Which items make a batch. Pure: lengths in, indices out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

SMALL_BATCH_TOKENS = 512
"""Up to so many tokens a second call of the model costs more than the padding that it saves."""


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

    def less(self, num_items: int) -> BatchLimits:
        """Return the limits with so many items fewer, but one at least."""
        return BatchLimits(max(1, self.max_items - num_items), self.max_tokens)

    def times(self, count: int) -> BatchLimits:
        """Return the limits of so many batches together."""
        return BatchLimits(self.max_items * count, self.max_tokens * count)


def cut_batches(lengths: Sequence[int], limits: BatchLimits, *, max_padding_share: float = 1.0) -> list[list[int]]:
    """Cut items into batches of similar length.

    Args:
        lengths: Tokens of each item.
        limits: What a batch may hold.
        max_padding_share: Share of a batch that may be padding, unless the batch is small.

    Returns:
        Indices, each once, longest first, so that a batch that does not fit into memory is met at once. Equal
        lengths keep their order, so that the batches depend on the items alone.
    """
    batches: list[list[int]] = []
    longest = num_tokens = 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batches:
            num_items = len(batches[-1]) + 1
            num_padded, num_tokens = num_items * longest, num_tokens + lengths[index]
            is_padded = (
                num_padded > SMALL_BATCH_TOKENS and num_padded - num_tokens > max_padding_share * num_padded
            )
            if limits.fits(num_items, longest) and not is_padded:
                batches[-1].append(index)
                continue
        batches.append([index])
        longest = num_tokens = lengths[index]
    return batches


def choose_batch(
    lengths: Sequence[int], groups: Sequence[int], limits: BatchLimits, *, present: Sequence[int] = ()
) -> list[int]:
    """Choose the items of the next batch among those that wait.

    The first item is taken before all others, and always where nothing is in work, so that none waits for ever.
    Then come the items of the lowest group, those nearest to it in length first, so that little is padded; then
    those of the next group.

    Args:
        lengths: Tokens of each waiting item, in the order of their arrival; the first one leads.
        groups: Rank of each item; lower ones come first.
        limits: What a batch may hold.
        present: Tokens of each item that is in work already and whose batch the chosen ones join.

    Returns:
        Indices, in no particular order but with 0 in front; none where the first item does not fit.
    """
    longest, num_present = max([lengths[0], *present]), len(present)
    if present and not limits.fits(num_present + 1, longest):
        return []
    chosen = [0]
    candidates = range(1, len(lengths))
    for index in sorted(candidates, key=lambda i: (groups[i], abs(lengths[i] - lengths[0]), i)):
        if num_present + len(chosen) >= limits.max_items:
            break
        if limits.fits(num_present + len(chosen) + 1, max(longest, lengths[index])):
            chosen.append(index)
            longest = max(longest, lengths[index])
    return chosen
