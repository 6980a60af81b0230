"""Marian (Junczys-Dowmunt et al. 2018, arXiv 1804.00344): layers normalised behind, sinusoidal positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagleray.engine.decoder.families import Parts, known, plain
from eagleray.engine.decoder.network import DecoderLayer, EncoderLayer, Network, Shape


class AddedPositions:
    """A table of positions that is added to the embeddings.

    Args:
        tokens_VE: Embeddings of tokens.
        places_PE: Embeddings of places.
        scale: Factor of the tokens' embeddings.
    """

    def __init__(self, tokens_VE: Tensor, places_PE: Tensor, scale: float) -> None:
        self._tokens_VE, self._places_PE, self._scale = tokens_VE, places_PE, scale

    def embed(self, tokens_N: Tensor, ages: Tensor | int) -> Tensor:
        """Return the embeddings of tokens at places, shape (N, E)."""
        places = self._places_PE[ages]
        return torch.add(places, self._tokens_VE.index_select(0, tokens_N), alpha=self._scale)

    def bias(self, num_queries: int, num_keys: int) -> None:
        """Return nothing: scores know of no places."""


def build(model: Any, parts: Parts) -> Network:
    """Take over a `MarianMTModel`.

    Raises:
        UnknownModelError: A part of it is not what its class makes.
    """
    encoder, decoder = known(model.model.encoder, "MarianEncoder"), known(model.model.decoder, "MarianDecoder")
    known(model.model, "MarianModel")
    config, device = model.config, model.final_logits_bias.device
    head_dim = config.d_model // config.decoder_attention_heads
    encoder_head_dim = config.d_model // config.encoder_attention_heads
    attentions = [known(layer.encoder_attn, "MarianAttention") for layer in decoder.layers]
    return Network(
        shape=Shape(len(decoder.layers), config.decoder_attention_heads, head_dim, config.encoder_attention_heads),
        pre_norm=False,
        encoder_scale=encoder_head_dim**-0.5,
        decoder_scale=head_dim**-0.5,
        encoder_positions=_positions(encoder, parts),
        encoder=[_encoder_layer(layer, config.activation_function, parts) for layer in encoder.layers],
        encoder_end=None,
        cross_keys_values=parts.linear(*(part for each in attentions for part in (each.k_proj, each.v_proj))),
        decoder_positions=_positions(decoder, parts),
        decoder=[_decoder_layer(layer, config.activation_function, parts) for layer in decoder.layers],
        decoder_end=None,
        scores=parts.product(parts.matrix(model.lm_head), plain(model.final_logits_bias)[0]),
        dtype=parts.dtype,
        device=device,
    )


def _positions(stack: Any, parts: Parts) -> AddedPositions:
    places = known(stack.embed_positions, "MarianSinusoidalPositionalEmbedding")
    return AddedPositions(parts.embedding(stack.embed_tokens), parts.floats(places.weight), stack.embed_scale)


def _encoder_layer(layer: Any, activation: str, parts: Parts) -> EncoderLayer:
    known(layer, "MarianEncoderLayer")
    own = known(layer.self_attn, "MarianAttention")
    return EncoderLayer(
        qkv=parts.linear(own.q_proj, own.k_proj, own.v_proj),
        out=parts.linear(own.out_proj),
        attention_norm=parts.layer_norm(layer.self_attn_layer_norm),
        feed_forward=parts.feed_forward(layer.fc1, layer.fc2, activation),
        feed_forward_norm=parts.layer_norm(layer.final_layer_norm),
    )


def _decoder_layer(layer: Any, activation: str, parts: Parts) -> DecoderLayer:
    known(layer, "MarianDecoderLayer")
    own, cross = known(layer.self_attn, "MarianAttention"), layer.encoder_attn
    return DecoderLayer(
        qkv=parts.linear(own.q_proj, own.k_proj, own.v_proj),
        out=parts.linear(own.out_proj),
        attention_norm=parts.layer_norm(layer.self_attn_layer_norm),
        cross_query=parts.linear(cross.q_proj),
        cross_out=parts.linear(cross.out_proj),
        cross_norm=parts.layer_norm(layer.encoder_attn_layer_norm),
        feed_forward=parts.feed_forward(layer.fc1, layer.fc2, activation),
        feed_forward_norm=parts.layer_norm(layer.final_layer_norm),
    )
