"""Generating target tokens. The only place that knows how; a faster loop takes its place behind `generate`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class DecodingOptions:
    """How a batch is decoded.

    Attributes:
        num_beams: Beams; 1 is greedy.
        max_new_tokens: Longest answer, in tokens.
        forced_bos_token_id: First token of every answer (the language, of a multilingual model); None: the model's
            own choice.
    """

    num_beams: int = 1
    max_new_tokens: int = 128
    forced_bos_token_id: int | None = None


@torch.no_grad()
def generate(
    model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor, options: DecodingOptions
) -> list[list[int]]:
    """Return the generated tokens of each row, special ones included.

    B: rows, S: source tokens.

    Args:
        model: A Hugging Face encoder-decoder model in evaluation mode.
        input_ids_BS: Source tokens, padded.
        attention_mask_BS: 1 where they are not padding.
        options: How to decode.
    """
    hf_model: Any = model
    first = options.forced_bos_token_id
    # None would override what the model's own generation config forces.
    forced = {} if first is None else {"forced_bos_token_id": first}
    tokens_BT = hf_model.generate(
        input_ids=input_ids_BS,
        attention_mask=attention_mask_BS,
        num_beams=options.num_beams,
        max_new_tokens=options.max_new_tokens,
        do_sample=False,
        **forced,
    )
    rows: list[list[int]] = tokens_BT.tolist()
    return rows
