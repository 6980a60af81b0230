"""Marian (Junczys-Dowmunt et al. 2018, arXiv 1804.00344): layers normalised behind, sinusoidal positions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from eagleray.engine.decoder.families import Parts
from eagleray.engine.decoder.network import DecoderLayer, EncoderLayer, Lookup, Network, Shape


class AddedPositions:
    """A table of positions that is added to the embeddings.

    Args:
        look_up: Embeddings of tokens.
        places_PE: Embeddings of places.
        scale: Factor of the tokens' embeddings.
    """

    def __init__(self, look_up: Lookup, places_PE: Tensor, scale: float) -> None:
        self._look_up, self._places_PE, self._scale = look_up, places_PE, scale

    def embed(self, tokens_N: Tensor, ages: Tensor | int) -> Tensor:
        """Return the embeddings of tokens at places, shape (N, E)."""
        places = self._places_PE[ages]
        return torch.add(places, self._look_up(tokens_N), alpha=self._scale)

    def bias(self, num_queries: int, num_keys: int) -> None:
        """Return nothing: scores know of no places."""


def build(model: Any, parts: Parts) -> Network:
    """Take over a `MarianMTModel`.

    Raises:
        UnknownModelError: A part of it is not what its class makes.
    """
    parts.known(model.model, "MarianModel")
    encoder = parts.known(model.model.encoder, "MarianEncoder")
    decoder = parts.known(model.model.decoder, "MarianDecoder")
    config, layers = model.config, parts.layers(decoder.layers)
    activation = config.activation_function
    num_heads, num_encoder_heads = config.decoder_attention_heads, config.encoder_attention_heads
    head_dim = config.d_model // num_heads
    attentions = [parts.known(layer.encoder_attn, "MarianAttention") for layer in layers]
    has_scores = parts.is_here(model.lm_head)
    return Network(
        shape=Shape(len(layers), num_heads // parts.degree, head_dim, num_encoder_heads // parts.degree),
        width=config.d_model,
        pre_norm=False,
        encoder_scale=(config.d_model // num_encoder_heads) ** -0.5,
        decoder_scale=head_dim**-0.5,
        encoder_positions=_positions(encoder, parts),
        encoder=[_encoder_layer(layer, activation, parts) for layer in parts.layers(encoder.layers)],
        encoder_end=None,
        cross_keys_values=parts.linear(*(part for each in attentions for part in (each.k_proj, each.v_proj))),
        decoder_positions=_positions(decoder, parts),
        decoder=[_decoder_layer(layer, activation, parts) for layer in layers],
        decoder_end=None,
        scores=parts.scores(model.lm_head, model.final_logits_bias[0]) if has_scores else None,
        dtype=parts.dtype,
        device=next(model.parameters()).device,
    )


def _positions(stack: Any, parts: Parts) -> AddedPositions | None:
    if not parts.is_here(stack.embed_tokens) or not parts.is_here(stack.embed_positions):
        return None
    places = parts.known(stack.embed_positions, "MarianSinusoidalPositionalEmbedding")
    return AddedPositions(parts.lookup(stack.embed_tokens), parts.floats(places.weight), stack.embed_scale)


def _encoder_layer(layer: Any, activation: str, parts: Parts) -> EncoderLayer:
    parts.known(layer, "MarianEncoderLayer")
    own = parts.known(layer.self_attn, "MarianAttention")
    return EncoderLayer(
        qkv=parts.linear(own.q_proj, own.k_proj, own.v_proj),
        out=parts.linear(own.out_proj),
        attention_norm=parts.layer_norm(layer.self_attn_layer_norm),
        feed_forward=parts.feed_forward(layer.fc1, layer.fc2, activation),
        feed_forward_norm=parts.layer_norm(layer.final_layer_norm),
    )


def _decoder_layer(layer: Any, activation: str, parts: Parts) -> DecoderLayer:
    parts.known(layer, "MarianDecoderLayer")
    own, cross = parts.known(layer.self_attn, "MarianAttention"), layer.encoder_attn
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
