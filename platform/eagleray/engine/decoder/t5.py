"""T5 (Raffel et al. 2020, arXiv 1910.10683): layers normalised before, places in attention's scores."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from eagleray.engine.decoder.families import Parts
from eagleray.engine.decoder.network import DecoderLayer, EncoderLayer, FeedForward, Lookup, Network, Norm, Shape

FIRST_TOKENS = 64
"""Tokens whose distances are looked up once for all; more when they are needed."""


class RelativePositions:
    """A bias for the distance of two tokens, the same in every layer.

    Args:
        look_up: Embeddings of tokens; None: they are elsewhere.
        attention: The first layer's attention, which knows how distances are numbered.
        biases_BH: The biases of these numbers.
    """

    def __init__(self, look_up: Lookup | None, attention: Any, biases_BH: Tensor) -> None:
        self._look_up, self._biases_BH = look_up, biases_BH
        self._number = partial(
            attention._relative_position_bucket,
            bidirectional=not attention.is_decoder,
            num_buckets=attention.relative_attention_num_buckets,
            max_distance=attention.relative_attention_max_distance,
        )
        self._table_HQK = self._make_table(FIRST_TOKENS)

    def embed(self, tokens_N: Tensor, ages: Tensor | int) -> Tensor:
        """Return the embeddings of tokens, wherever they stand, shape (N, E)."""
        assert self._look_up is not None, "another stage embeds the tokens"
        return self._look_up(tokens_N)

    def bias(self, num_queries: int, num_keys: int) -> Tensor:
        """Return what is added to the scores of the last `num_queries` of so many tokens, shape (1, H, Q, K)."""
        if self._table_HQK.shape[-1] < num_keys:
            self._table_HQK = self._make_table(2 * num_keys)
        # Only distances count: the last rows of a corner say what the last rows of all tokens would.
        return self._table_HQK[None, :, num_keys - num_queries : num_keys, :num_keys]

    def _make_table(self, num_tokens: int) -> Tensor:
        places = torch.arange(num_tokens, device=self._biases_BH.device)
        return self._biases_BH[self._number(places - places[:, None])].permute(2, 0, 1)


def build(model: Any, parts: Parts) -> Network:
    """Take over a `T5ForConditionalGeneration`.

    Raises:
        UnknownModelError: A part of it is not what its class makes.
    """
    encoder, decoder = parts.known(model.encoder, "T5Stack"), parts.known(model.decoder, "T5Stack")
    config, blocks = model.config, parts.layers(decoder.block)
    cross = [parts.known(block.layer[1], "T5LayerCrossAttention").EncDecAttention for block in blocks]
    num_heads, has_scores = config.num_heads // parts.degree, parts.is_here(model.lm_head)
    width = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
    return Network(
        shape=Shape(len(blocks), num_heads, config.d_kv, num_heads),
        width=config.d_model,
        pre_norm=True,
        encoder_scale=1.0,
        decoder_scale=1.0,
        encoder_positions=_positions(encoder, parts),
        encoder=[_encoder_layer(block, config, parts) for block in parts.layers(encoder.block)],
        encoder_end=_end(encoder, parts),
        cross_keys_values=parts.linear(*(part for each in cross for part in (each.k, each.v))),
        decoder_positions=_positions(decoder, parts),
        decoder=[_decoder_layer(block, config, parts) for block in blocks],
        decoder_end=_end(decoder, parts, width),
        scores=parts.scores(model.lm_head, None) if has_scores else None,
        dtype=parts.dtype,
        device=next(model.parameters()).device,
    )


def _positions(stack: Any, parts: Parts) -> RelativePositions | None:
    first = next(iter(stack.block.children()), None)  # of a list of layers that is elsewhere nothing is here
    if first is None:
        return None
    attention = parts.known(first.layer[0].SelfAttention, "T5Attention")
    biases_BH = parts.floats(attention.relative_attention_bias.weight)
    look_up = parts.lookup(stack.embed_tokens) if parts.is_here(stack.embed_tokens) else None
    return RelativePositions(look_up, attention, biases_BH)


def _end(stack: Any, parts: Parts, factor: float = 1.0) -> Norm | None:
    if not parts.is_here(stack.final_layer_norm):
        return None
    return _scaled(_norm(stack.final_layer_norm, parts), factor)


def _encoder_layer(block: Any, config: Any, parts: Parts) -> EncoderLayer:
    attention, inner = parts.known(block, "T5Block").layer
    own = parts.known(parts.known(attention, "T5LayerSelfAttention").SelfAttention, "T5Attention")
    return EncoderLayer(
        qkv=parts.linear(own.q, own.k, own.v),
        out=parts.linear(own.o),
        attention_norm=_norm(attention.layer_norm, parts),
        feed_forward=_feed_forward(inner, config, parts),
        feed_forward_norm=_norm(inner.layer_norm, parts),
    )


def _decoder_layer(block: Any, config: Any, parts: Parts) -> DecoderLayer:
    attention, crossing, inner = parts.known(block, "T5Block").layer
    own = parts.known(parts.known(attention, "T5LayerSelfAttention").SelfAttention, "T5Attention")
    cross = parts.known(crossing.EncDecAttention, "T5Attention")
    return DecoderLayer(
        qkv=parts.linear(own.q, own.k, own.v),
        out=parts.linear(own.o),
        attention_norm=_norm(attention.layer_norm, parts),
        cross_query=parts.linear(cross.q),
        cross_out=parts.linear(cross.o),
        cross_norm=_norm(crossing.layer_norm, parts),
        feed_forward=_feed_forward(inner, config, parts),
        feed_forward_norm=_norm(inner.layer_norm, parts),
    )


def _feed_forward(layer: Any, config: Any, parts: Parts) -> FeedForward:
    dense = parts.known(layer, "T5LayerFF").DenseReluDense
    if config.is_gated_act:
        parts.known(dense, "T5DenseGatedActDense")
        return parts.feed_forward(dense.wi_0, dense.wo, config.dense_act_fn, dense.wi_1)
    parts.known(dense, "T5DenseActDense")
    return parts.feed_forward(dense.wi, dense.wo, config.dense_act_fn)


def _norm(module: Any, parts: Parts) -> Norm:
    weight, eps = parts.floats(parts.known(module, "T5LayerNorm").weight), module.variance_epsilon

    def norm(x: Tensor) -> Tensor:
        # Sums of squares in float32, as transformers does it.
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(weight.dtype)

    return norm


def _scaled(norm: Norm, factor: float) -> Norm:
    return norm if factor == 1.0 else lambda x: norm(x) * factor
