"""Generating target tokens: the one place that decides who decodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eagleray.engine.decoder import NetworkGenerator, UnknownModelError
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits

__all__ = ["DecodingOptions", "GeneratingModel", "TokenGenerator", "generate", "with_generator"]

logger = logging.getLogger(__name__)


class TokenGenerator(Protocol):
    """Decodes rows of source tokens."""

    def generate(self, sources: Sequence[Sequence[int]], options: DecodingOptions) -> list[list[int]]:
        """Return what is generated for each source, the start token in front, without padding behind."""
        ...


class GeneratingModel(nn.Module):
    """A model together with what decodes for it; called, it is the model.

    Args:
        model: A Hugging Face encoder-decoder model in evaluation mode.
        generator: Decodes with its weights.
    """

    def __init__(self, model: nn.Module, generator: TokenGenerator) -> None:
        super().__init__()
        self.model = model
        self.generator = generator

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        return self.model(*args, **kwargs)


def with_generator(model: nn.Module, limits: BatchLimits) -> nn.Module:
    """Return a model that is loaded for inference together with our decoder, where that knows the model.

    Args:
        model: A model in evaluation mode, whose weights do not change any more.
        limits: Rows decoded at once.
    """
    if not hasattr(model, "generate"):
        return model
    try:
        return GeneratingModel(model, NetworkGenerator.of(model, limits)).eval()
    except UnknownModelError as error:
        logger.info("transformers decodes: %s", error)
        return model


@torch.no_grad()
def generate(
    model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor, options: DecodingOptions
) -> list[list[int]]:
    """Return the generated tokens of each row, special ones included; rows may end with padding.

    B: rows, S: source tokens.

    Args:
        model: A Hugging Face encoder-decoder model in evaluation mode, or a `GeneratingModel`.
        input_ids_BS: Source tokens, padded behind.
        attention_mask_BS: 1 where they are not padding.
        options: How to decode.
    """
    sources = _unpad(input_ids_BS, attention_mask_BS)
    generator = _find_generator(model, len(input_ids_BS))
    if sources is not None and generator is not None:
        return generator.generate(sources, options)
    return _generate_by_transformers(model, input_ids_BS, attention_mask_BS, options)


def _find_generator(model: nn.Module, num_rows: int) -> TokenGenerator | None:
    if isinstance(model, GeneratingModel):
        return model.generator
    try:
        # A model in training: its weights are others every time.
        return NetworkGenerator.of(model, BatchLimits(num_rows, 2**62))
    except UnknownModelError as error:
        logger.debug("transformers decodes: %s", error)
        return None


def _unpad(input_ids_BS: Tensor, attention_mask_BS: Tensor) -> list[list[int]] | None:
    """Return the tokens of each row; None: a row is empty, or padded elsewhere than behind."""
    lengths = attention_mask_BS.sum(1)
    places = torch.arange(attention_mask_BS.shape[1], device=attention_mask_BS.device)
    padded_behind = torch.equal(places < lengths[:, None], attention_mask_BS.bool())
    if not padded_behind or not len(lengths) or not lengths.all():
        return None
    return [row[:length] for row, length in zip(input_ids_BS.tolist(), lengths.tolist(), strict=True)]


def _generate_by_transformers(
    model: nn.Module, input_ids_BS: Tensor, attention_mask_BS: Tensor, options: DecodingOptions
) -> list[list[int]]:
    hf_model: Any = model.model if isinstance(model, GeneratingModel) else model
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
