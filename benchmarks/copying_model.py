"""A translator that is made, not trained: it copies its source, so that every engine has the same work.

The positions of source and target meet in the first cross-attention, which brings the source's embedding; tied to
the embeddings, the output finds the token. So an answer is as long as its source and ends by itself, in every
precision. All other weights are small random numbers: they cost what trained ones cost.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

EOS, PAD, FIRST_WORD = 0, 1, 2
SHARPNESS, LOUDNESS, NOISE = 9.0, 4.0, 0.1


@dataclass(frozen=True, slots=True)
class Size:
    """Sizes of a model.

    Attributes:
        width: Of the model; the feed-forward layers are four times as wide, a head 64 or less.
        num_layers: Of the encoder and of the decoder.
        vocab_size: Tokens.
    """

    width: int
    num_layers: int
    vocab_size: int

    @property
    def name(self) -> str:
        """How tables call it."""
        return f"width {self.width}, {self.num_layers} + {self.num_layers} layers, {self.vocab_size} tokens"


def copying_model(size: Size, longest: int) -> Any:
    """Return a `MarianMTModel` of this size.

    Args:
        size: Its sizes.
        longest: Most tokens of a source.
    """
    from transformers import MarianConfig, MarianMTModel

    heads = max(4, size.width // 64)
    config = MarianConfig(
        vocab_size=size.vocab_size, d_model=size.width, encoder_layers=size.num_layers,
        decoder_layers=size.num_layers, encoder_attention_heads=heads, decoder_attention_heads=heads,
        encoder_ffn_dim=4 * size.width, decoder_ffn_dim=4 * size.width, max_position_embeddings=2 * longest + 8,
        pad_token_id=PAD, eos_token_id=EOS, decoder_start_token_id=PAD, forced_eos_token_id=None,
        scale_embedding=True, activation_function="swish", dropout=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model: Any = MarianMTModel(config).eval()
    model.generation_config.max_length = None
    with torch.no_grad():
        _scatter(model)
        _align(model, size.width, size.width // heads)
    return model


def _scatter(model: Any) -> None:
    """Fill everything but norms and positions with small random numbers."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and "embed_positions" not in name:
            parameter.normal_(std=NOISE / parameter.shape[1] ** 0.5)


def _align(model: Any, width: int, head_dim: int) -> None:
    """Let the target's place find the same place of the source, and bring its token."""
    fast = head_dim // 8  # of sine and cosine each: the waves that tell neighbours apart
    places = torch.cat([torch.arange(fast), width // 2 + torch.arange(fast)])
    words = torch.ones(width)
    words[places] = 0  # tokens stay out of these dimensions, else they would blur the places
    # A layer norm takes the mean away: where it is nothing, places stay what they are.
    embeddings = model.model.shared.weight
    embeddings.copy_(_without_mean(torch.randn_like(embeddings) * words, words) * (2 / width) ** 0.5 / 2)
    for stack in (model.model.encoder, model.model.decoder):
        table = stack.embed_positions.weight
        table.copy_(_without_mean(table, words))
    attention = model.model.decoder.layers[0].encoder_attn
    for start in range(0, width, head_dim):
        rows = start + torch.arange(len(places))
        attention.q_proj.weight[rows, places] = SHARPNESS
        attention.k_proj.weight[rows, places] = SHARPNESS
    attention.v_proj.weight.copy_(torch.eye(width))
    attention.out_proj.weight.copy_(torch.diag(words) * LOUDNESS)


def _without_mean(rows: torch.Tensor, dims: torch.Tensor) -> torch.Tensor:
    """Take each row's sum away from some of its dimensions."""
    return rows - dims * rows.sum(-1, keepdim=True) / dims.sum()


def sources(size: Size, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Return rows of 4 to `longest` tokens, of random words, with the end token."""
    draw = random.Random(seed)
    lengths = [draw.randint(4, longest) for _ in range(count)]
    return [[draw.randrange(FIRST_WORD, size.vocab_size) for _ in range(length - 1)] + [EOS] for length in lengths]
