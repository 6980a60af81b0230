"""What a caller may ask of decoding."""

from __future__ import annotations

from dataclasses import dataclass


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
