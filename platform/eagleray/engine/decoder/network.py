"""An encoder-decoder transformer as plain tensors: what a decoding session computes.

A family's adapter fills it with a model's weights. Every matrix product sees tokens that are packed, without
padding; the decoder sees one token of each hypothesis and returns its scores.

Legend: N: tokens, R: rows, K: beams of a row, S: source tokens, C: columns of the cache, E: width, H: heads,
D: width of a head, V: vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from eagleray.engine.decoder.cache import CacheShape, KeyValueCache
from eagleray.engine.decoder.linear import Linear
from eagleray.engine.decoder.packing import Packing

Norm = Callable[[Tensor], Tensor]

Lookup = Callable[[Tensor], Tensor]
"""From tokens, shape (N,), to their embeddings, shape (N, E)."""


@dataclass(frozen=True, slots=True)
class FeedForward:
    """The sub-layer of a token by itself.

    Attributes:
        up: From the width to the inner width.
        down: And back.
        activation: Between them.
        gate: A second `up` whose result is multiplied by the activation's (Shazeer 2020, arXiv 2002.05202).
    """

    up: Linear
    down: Linear
    activation: Callable[[Tensor], Tensor]
    gate: Linear | None = None

    def __call__(self, x_NE: Tensor) -> Tensor:
        """Return the sub-layer's result, without the residual."""
        inner = self.activation(self.up(x_NE))
        return self.down(inner if self.gate is None else inner * self.gate(x_NE))


@dataclass(frozen=True, slots=True)
class EncoderLayer:
    """Weights of a layer: `qkv` makes queries, keys and values in one product."""

    qkv: Linear
    out: Linear
    attention_norm: Norm
    feed_forward: FeedForward
    feed_forward_norm: Norm


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """Weights of a layer; the keys and values of its cross-attention are made at once for all layers."""

    qkv: Linear
    out: Linear
    attention_norm: Norm
    cross_query: Linear
    cross_out: Linear
    cross_norm: Norm
    feed_forward: FeedForward
    feed_forward_norm: Norm


class Positions(Protocol):
    """What a family adds for the places of tokens: to the embeddings, or to attention's scores."""

    def embed(self, tokens_N: Tensor, ages: Tensor | int) -> Tensor:
        """Return the embeddings of tokens at places, shape (N, E).

        Args:
            tokens_N: Tokens.
            ages: Place of each one, shape (N,), or of all.
        """
        ...

    def bias(self, num_queries: int, num_keys: int) -> Tensor | None:
        """Return what is added to the scores of the last `num_queries` of so many tokens, shape (1, H, Q, K)."""
        ...


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes that a cache needs.

    Attributes:
        num_layers: Layers of the decoder.
        num_heads: Heads of the decoder's attention.
        head_dim: Width of one.
        num_encoder_heads: Heads of the encoder's attention.
    """

    num_layers: int
    num_heads: int
    head_dim: int
    num_encoder_heads: int


class Decoder(Protocol):
    """What a decoding session drives: a network in this process, or one that is cut over several."""

    @property
    def device(self) -> torch.device:
        """Where scores and tokens are."""
        ...

    def make_cache(self, num_beams: int, num_slots: int) -> KeyValueCache:
        """Return an empty cache for so many rows."""
        ...

    def admit(self, sources: Sequence[Sequence[int]], cache: KeyValueCache) -> None:
        """Encode rows and let them into a cache, behind the last one."""
        ...

    def step(self, tokens_N: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the scores of the tokens that follow the last one of each hypothesis, shape (N, V)."""
        ...


@dataclass(frozen=True, slots=True)
class Network:
    """Weights and how they are put together.

    A stage of a pipeline has some of the layers, and what stands before and behind them where it is the first or
    the last one of the encoder or the decoder.

    Attributes:
        shape: Sizes.
        width: Of the residual stream.
        pre_norm: Whether a sub-layer's input is normalised, or what it and the residual make.
        encoder_scale: Factor of the products of queries and keys.
        decoder_scale: The same of the decoder.
        encoder_positions: Embeddings of source tokens; None: another stage has them.
        encoder: Layers.
        encoder_end: After the last layer.
        cross_keys_values: Keys and values of all layers' cross-attention from the encoder's result.
        decoder_positions: Embeddings of target tokens; None: another stage has them.
        decoder: Layers.
        decoder_end: After the last layer.
        scores: From the decoder's result to the vocabulary; None: another stage has it.
        dtype: Of the activations.
        device: Where the weights are.
    """

    shape: Shape
    width: int
    pre_norm: bool
    encoder_scale: float
    decoder_scale: float
    encoder_positions: Positions | None
    encoder: Sequence[EncoderLayer]
    encoder_end: Norm | None
    cross_keys_values: Linear
    decoder_positions: Positions | None
    decoder: Sequence[DecoderLayer]
    decoder_end: Norm | None
    scores: Linear | None
    dtype: torch.dtype
    device: torch.device

    def make_cache(self, num_beams: int, num_slots: int) -> KeyValueCache:
        """Return an empty cache for so many rows."""
        shape = self.shape
        sizes = CacheShape(shape.num_layers, shape.num_heads, shape.head_dim, num_beams, num_slots)
        return KeyValueCache(sizes, self.dtype, self.device)

    def admit(self, sources: Sequence[Sequence[int]], cache: KeyValueCache) -> None:
        """Encode rows and let them into a cache, behind the last one."""
        packing = Packing(sources, self.device)
        self.join(self.close_source(self.run_encoder(self.embed_source(packing), packing)), packing, cache)

    def step(self, tokens_N: Tensor, cache: KeyValueCache) -> Tensor:
        """Return the scores of the tokens that follow the last one of each hypothesis, shape (N, V).

        Args:
            tokens_N: Last tokens, the beams of a row beside each other; N is R times K.
            cache: Of these rows; it takes their keys and values.
        """
        cache.begin_column()
        return self.score(self.run_decoder(self.embed_target(tokens_N, cache), cache))

    def embed_source(self, packing: Packing) -> Tensor:
        """Return what the first layer of the encoder gets, shape (N, E)."""
        assert self.encoder_positions is not None, "another stage embeds the sources"
        return self.encoder_positions.embed(packing.tokens_N, packing.places_N)

    def run_encoder(self, x_NE: Tensor, packing: Packing) -> Tensor:
        """Run the layers of the encoder."""
        bias = None if self.encoder_positions is None else self.encoder_positions.bias(*(2 * [packing.longest]))
        x, mask = x_NE, packing.mask(bias, x_NE.dtype)
        for layer in self.encoder:
            if self.pre_norm:
                x = x + self._attend_source(layer.attention_norm(x), layer, packing, mask)
                x = x + layer.feed_forward(layer.feed_forward_norm(x))
            else:
                x = layer.attention_norm(x + self._attend_source(x, layer, packing, mask))
                x = layer.feed_forward_norm(x + layer.feed_forward(x))
        return x

    def close_source(self, x_NE: Tensor) -> Tensor:
        """Return what the decoder reads of the encoder's last layer."""
        return x_NE if self.encoder_end is None else self.encoder_end(x_NE)

    def join(self, memory_NE: Tensor, packing: Packing, cache: KeyValueCache) -> None:
        """Let encoded rows into a cache: the keys and values of the cross-attention of each source token."""
        shape = self.shape
        cross = packing.pad(self.cross_keys_values(memory_NE))
        cross = cross.view(packing.num_rows, packing.longest, shape.num_layers, 2, shape.num_heads, shape.head_dim)
        cache.join(cross.permute(2, 3, 0, 4, 1, 5), packing.lengths)

    def embed_target(self, tokens_N: Tensor, cache: KeyValueCache) -> Tensor:
        """Return what the first layer of the decoder gets, shape (N, E)."""
        assert self.decoder_positions is not None, "another stage embeds the tokens"
        return self.decoder_positions.embed(tokens_N, cache.ages())

    def run_decoder(self, x_NE: Tensor, cache: KeyValueCache) -> Tensor:
        """Run the layers of the decoder on the present tokens."""
        x, mask = x_NE, self._self_mask(cache)
        for number, layer in enumerate(self.decoder):
            if self.pre_norm:
                x = x + layer.out(self._attend_self(layer.qkv(layer.attention_norm(x)), cache, number, mask))
                x = x + layer.cross_out(self._attend_cross(layer.cross_query(layer.cross_norm(x)), cache, number))
                x = x + layer.feed_forward(layer.feed_forward_norm(x))
            else:
                x = layer.attention_norm(x + layer.out(self._attend_self(layer.qkv(x), cache, number, mask)))
                x = layer.cross_norm(x + layer.cross_out(self._attend_cross(layer.cross_query(x), cache, number)))
                x = layer.feed_forward_norm(x + layer.feed_forward(x))
        return x

    def score(self, x_NE: Tensor) -> Tensor:
        """Return the scores of all tokens, shape (N, V)."""
        assert self.scores is not None, "another stage scores the tokens"
        return self.scores(x_NE if self.decoder_end is None else self.decoder_end(x_NE))

    def _attend_source(self, x_NE: Tensor, layer: EncoderLayer, packing: Packing, mask: Tensor | None) -> Tensor:
        padded = packing.pad(layer.qkv(x_NE))
        qkv = padded.view(packing.num_rows, packing.longest, 3, self.shape.num_encoder_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=self.encoder_scale)
        return layer.out(packing.unpad(found.transpose(1, 2).reshape(packing.num_rows * packing.longest, -1)))

    def _self_mask(self, cache: KeyValueCache) -> Tensor | None:
        positions = self.decoder_positions
        bias = None if positions is None else positions.bias(1, cache.num_window_columns)
        mask = cache.self_mask()
        if bias is None:
            return mask
        if cache.num_beams > 1:
            bias = bias.repeat_interleave(cache.num_beams, -1)
        return bias if mask is None else bias + mask

    def _attend_self(self, qkv_NE: Tensor, cache: KeyValueCache, layer: int, mask: Tensor | None) -> Tensor:
        rows, beams, heads, width = cache.num_rows, cache.num_beams, self.shape.num_heads, self.shape.head_dim
        qkv = qkv_NE.view(rows, beams, 3, heads, width)
        cache.write(layer, qkv[:, :, 1:])
        keys, values = cache.self_keys_values(layer)
        found = F.scaled_dot_product_attention(
            qkv[:, :, 0].transpose(1, 2), keys, values, attn_mask=mask, scale=self.decoder_scale
        )
        return found.transpose(1, 2).reshape(rows * beams, heads * width)

    def _attend_cross(self, query_NE: Tensor, cache: KeyValueCache, layer: int) -> Tensor:
        rows, beams, heads, width = cache.num_rows, cache.num_beams, self.shape.num_heads, self.shape.head_dim
        query = query_NE.view(rows, beams, heads, width).transpose(1, 2)
        keys, values = cache.cross_keys_values(layer)
        found = F.scaled_dot_product_attention(
            query, keys, values, attn_mask=cache.cross_mask(), scale=self.decoder_scale
        )
        return found.transpose(1, 2).reshape(rows * beams, heads * width)
