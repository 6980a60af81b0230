"""Keys and values of the rows that run, in memory that stays where it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIRST_COLUMNS = 32
"""Columns that a cache starts with; they double when they are full."""


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Sizes of a cache.

    Attributes:
        num_layers: Layers of the decoder.
        num_heads: Heads of its attention.
        head_dim: Width of one.
        num_beams: Hypotheses of a row.
        num_slots: Most rows at once.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_beams: int
    num_slots: int


class KeyValueCache:
    """Keys and values of self- and cross-attention.

    Attention does not care in which order it sums, so all rows write their next token into one common column,
    whatever their age: a slice, not a scatter. A row that joins later does not see the columns before its own.
    What lies before the oldest row's first column is given back when the columns are full. The beams of a row
    share its columns, each one a part of a column, and a mask says whose past each part is: choosing other parents
    moves bits of that mask and no keys. Their cross-attention reads the source's keys once for all of them.

    Rows are in slots 0 to `num_rows`, without holes: they join at the end, and when some leave, the last ones take
    their slots.

    Legend: L: layers, B: keys and values, R: rows, H: heads, C: columns times beams, K: beams, D: width of a head,
    S: source tokens.

    Args:
        shape: Sizes.
        dtype: Of keys and values.
        device: Where they are.
    """

    def __init__(self, shape: CacheShape, dtype: torch.dtype, device: torch.device) -> None:
        self.num_beams = shape.num_beams
        self.num_slots = shape.num_slots
        self.num_rows = 0
        self._shape, self._dtype, self._device = shape, dtype, device
        self._column = -1  # the last one that was written
        self._starts: list[int] = []  # first column of each row
        self._source_lengths: list[int] = []
        self.longest_source = 0
        self._low = 0  # first column of the oldest row
        self._self_LBRHCD = self._empty(FIRST_COLUMNS * self.num_beams)
        self._bias_RKC = self._bias(FIRST_COLUMNS)
        self._cross_LBRHSD = self._empty(0)
        self._cross_bias_RS = torch.zeros(shape.num_slots, 0, dtype=dtype, device=device)
        # Views of the memory, one per layer, made once for all uses.
        self._windows: Sequence[Tensor] = ()
        self._columns: Sequence[Tensor] = ()
        self._sources: Sequence[Sequence[Tensor]] = ()
        self._cross_mask: Tensor | None = None

    @property
    def num_window_columns(self) -> int:
        """Columns that the oldest row sees."""
        return self._column + 1 - self._low

    def ages(self) -> Tensor | int:
        """Return the place of each hypothesis' present token, shape (R * K,); a number where all are equal."""
        if self._is_even():
            return self._column - self._low
        ages = torch.tensor([self._column - start for start in self._starts], device=self._device)
        return ages if self.num_beams == 1 else ages.repeat_interleave(self.num_beams)

    def join(self, cross_LBRHSD: Tensor, lengths: Sequence[int]) -> None:
        """Let rows in, behind the last one.

        Args:
            cross_LBRHSD: Keys and values of their cross-attention, padded with finite numbers.
            lengths: Source tokens of each row.
        """
        first, last, longest = self.num_rows, self.num_rows + len(lengths), cross_LBRHSD.shape[4]
        assert last <= self._shape.num_slots, "more rows than slots"
        if not first:
            self._column, self._low = -1, 0
        self._reserve_source(longest)
        self._cross_LBRHSD[:, :, first:last, :, :longest] = cross_LBRHSD
        # What was there before need not be finite, and hidden is not enough: zero times infinity is no number.
        self._cross_LBRHSD[:, :, first:last, :, longest:] = 0
        places = torch.arange(self._cross_bias_RS.shape[1], device=self._device)
        hidden = places >= torch.tensor(lengths, device=self._device)[:, None]
        bias = self._cross_bias_RS[first:last]
        bias.zero_().masked_fill_(hidden, float("-inf"))
        start = self._column + 1
        self._self_LBRHCD[:, :, first:last, :, self._low * self.num_beams : start * self.num_beams] = 0
        self._bias_RKC[first:last] = self._own(self._bias_RKC.shape[-1])
        self._bias_RKC[first:last, :, : start * self.num_beams] = float("-inf")
        self._starts += [start] * len(lengths)
        self._source_lengths += lengths
        self.num_rows = last
        self._measure()

    def keep(self, kept: Sequence[int]) -> list[int]:
        """Let all but some rows go.

        Args:
            kept: Slots of the rows that stay, in ascending order.

        Returns:
            The former slot of each row that stays, in the order of their slots from now on.
        """
        count = len(kept)
        staying = {slot for slot in kept if slot < count}
        movers = [slot for slot in kept if slot >= count]
        holes = [slot for slot in range(count) if slot not in staying]
        if movers:
            to, of = (torch.tensor(slots, device=self._device) for slots in (holes, movers))
            for tensor in (self._self_LBRHCD[..., self._window(), :], self._cross_LBRHSD):
                tensor.index_copy_(2, to, tensor.index_select(2, of))
            for tensor in (self._bias_RKC, self._cross_bias_RS):
                tensor.index_copy_(0, to, tensor.index_select(0, of))
        moved = dict(zip(holes, movers, strict=True))
        order = [moved.get(slot, slot) for slot in range(count)]
        self._starts = [self._starts[slot] for slot in order]
        self._source_lengths = [self._source_lengths[slot] for slot in order]
        self.num_rows = count
        self._measure()
        return order

    def reorder(self, parents_RK: Tensor) -> None:
        """Let each beam go on from the past of another beam of its row.

        Args:
            parents_RK: Beam that each one continues.
        """
        window = self._bias_RKC[: self.num_rows, :, self._window()]
        window.copy_(window.gather(1, parents_RK[:, :, None].expand_as(window)))

    def begin_column(self) -> None:
        """Make room for one more token of every row."""
        self._column += 1
        num_columns = self._bias_RKC.shape[-1] // self.num_beams
        if self._column == num_columns:
            self._rebuild(num_columns if 2 * self._low >= num_columns else 2 * num_columns)
        window = self._self_LBRHCD[:, :, : self.num_rows, :, self._window()]
        self._windows, self._columns = window.unbind(), window[..., -self.num_beams :, :].unbind()

    def write(self, layer: int, keys_values: Tensor) -> None:
        """Write what the present tokens are remembered by.

        Args:
            layer: Layer of the decoder.
            keys_values: Shape (R, K, 2, H, D).
        """
        self._columns[layer].copy_(keys_values.permute(2, 0, 3, 1, 4))

    def self_keys_values(self, layer: int) -> Sequence[Tensor]:
        """Return a layer's keys and values up to the present tokens, each of shape (R, H, columns * K, D)."""
        return self._windows[layer].unbind()

    def cross_keys_values(self, layer: int) -> Sequence[Tensor]:
        """Return a layer's keys and values of the sources, each of shape (R, H, S, D)."""
        return self._sources[layer]

    def self_mask(self) -> Tensor | None:
        """Return what hides others' columns, shape (R, 1, K, columns * K); None: nothing is hidden."""
        if self.num_beams == 1 and self._is_even():
            return None
        return self._bias_RKC[: self.num_rows, None, :, self._window()]

    def cross_mask(self) -> Tensor | None:
        """Return what hides the padding of sources, shape (R, 1, 1, S); None: there is none."""
        return self._cross_mask

    def _window(self) -> slice:
        return slice(self._low * self.num_beams, (self._column + 1) * self.num_beams)

    def _is_even(self) -> bool:
        return max(self._starts) == self._low

    def _measure(self) -> None:
        self._low = min(self._starts, default=0)
        self.longest_source = longest = max(self._source_lengths, default=0)
        sources = self._cross_LBRHSD[:, :, : self.num_rows, :, :longest]
        self._sources = [layer.unbind() for layer in sources.unbind()]
        is_padded = min(self._source_lengths, default=0) < longest
        self._cross_mask = self._cross_bias_RS[: self.num_rows, None, None, :longest] if is_padded else None

    def _empty(self, num_columns: int) -> Tensor:
        shape = self._shape
        sizes = (shape.num_layers, 2, shape.num_slots, shape.num_heads, num_columns, shape.head_dim)
        return torch.empty(sizes, dtype=self._dtype, device=self._device)

    def _own(self, num_columns: int) -> Tensor:
        """Return the mask of beams that have seen nothing but their own parts, shape (K, columns)."""
        beams = torch.arange(self.num_beams, device=self._device)
        hidden = beams[:, None] != torch.arange(num_columns, device=self._device) % self.num_beams
        mask = torch.zeros(hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(hidden, float("-inf"))

    def _bias(self, num_columns: int) -> Tensor:
        own = self._own(num_columns * self.num_beams)
        return own.expand(self._shape.num_slots, *own.shape).contiguous()

    def _rebuild(self, num_columns: int) -> None:
        """Move what the rows see to the front of so many columns."""
        used = slice(self._low * self.num_beams, self._column * self.num_beams)
        count = used.stop - used.start
        keys_values, bias = self._self_LBRHCD[..., used, :], self._bias_RKC[..., used]
        self._self_LBRHCD, self._bias_RKC = self._empty(num_columns * self.num_beams), self._bias(num_columns)
        self._self_LBRHCD[..., :count, :] = keys_values
        self._bias_RKC[:, :, :count] = bias
        self._starts = [start - self._low for start in self._starts]
        self._column -= self._low
        self._low = 0

    def _reserve_source(self, longest: int) -> None:
        present = self._cross_bias_RS.shape[1]
        if longest <= present:
            return
        cross, bias = self._cross_LBRHSD, self._cross_bias_RS
        self._cross_LBRHSD = self._empty(longest)
        self._cross_LBRHSD[..., :present, :] = cross
        self._cross_LBRHSD[..., present:, :] = 0
        self._cross_bias_RS = bias.new_full((len(bias), longest), float("-inf"))
        self._cross_bias_RS[:, :present] = bias
