"""Models with random weights that say many different things, and sources for them."""

from __future__ import annotations

import random
from typing import Any

import torch

VOCAB_SIZE, PAD, EOS = 60, 59, 0


def marian(**changes: Any) -> Any:
    """Return a `MarianMTModel` whose answers vary and end at different lengths."""
    from transformers import MarianConfig, MarianMTModel

    sizes = {
        "vocab_size": VOCAB_SIZE, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2,
        "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "max_position_embeddings": 64, "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD,
        "forced_eos_token_id": None, "scale_embedding": True,
    }  # fmt: skip
    model = _varied(MarianMTModel, MarianConfig(**{**sizes, **changes}), 0.8)
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[EOS] *= 2
    return model


def t5(**changes: Any) -> Any:
    """Return a `T5ForConditionalGeneration`, by default of the first version."""
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": VOCAB_SIZE, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4,
        "pad_token_id": PAD, "eos_token_id": EOS, "decoder_start_token_id": PAD,
    }  # fmt: skip
    model = _varied(T5ForConditionalGeneration, T5Config(**{**sizes, **changes}), 0.4)
    with torch.no_grad():
        model.lm_head.weight[EOS] *= 3
    return model


def _varied(cls: Any, config: Any, spread: float) -> Any:
    """Draw weights with which answers differ; the factors above were chosen so that many of them end early."""
    model = cls(config).eval()
    torch.manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "embed_positions" not in name:
                parameter.normal_(std=0.3 if "shared" in name else spread)
            elif "bias" in name:
                parameter.normal_(std=0.1)
    model.generation_config.max_length = None
    return model


def sources(count: int, longest: int = 24, seed: int = 1) -> list[list[int]]:
    """Return rows of mixed length."""
    draw = random.Random(seed)
    return [[draw.randrange(1, PAD) for _ in range(draw.randint(1, longest))] + [EOS] for _ in range(count)]


def padded(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rows as a batch and its attention mask."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask
