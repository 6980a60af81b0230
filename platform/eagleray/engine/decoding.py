"""Generating target tokens: the one place that decides who decodes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from eagleray.engine.ctranslate import CTranslate2Generator, is_known
from eagleray.engine.decoder import DecodingSession, NetworkGenerator, UnknownModelError
from eagleray.engine.decoder.linear import Precision
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits
from eagleray.errors import ConfigError

__all__ = ["DecodingOptions", "GeneratingModel", "TokenGenerator", "generate", "load_generator"]

Backend = Literal["auto", "torch", "ctranslate2"]

logger = logging.getLogger(__name__)


class TokenGenerator(Protocol):
    """Decodes rows of source tokens."""

    def generate(self, sources: Sequence[Sequence[int]], options: DecodingOptions) -> list[list[int]]:
        """Return what is generated for each source, the start token in front, without padding behind."""
        ...

    is_stepwise: bool
    """Whether it is as fast where rows enter and leave one by one."""

    @property
    def start_token_id(self) -> int:
        """What stands in front of every answer."""
        ...

    def session(self, options: DecodingOptions) -> DecodingSession:
        """Return a session that rows enter and leave while others are decoded."""
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


def load_generator(
    model: nn.Module, limits: BatchLimits, precision: Precision = "float32", backend: Backend = "auto"
) -> TokenGenerator | None:
    """Return what decodes for a model that is loaded for inference; None: transformers does.

    Args:
        model: A model in evaluation mode, whose weights do not change any more.
        limits: Rows decoded at once.
        precision: Of the matrix products.
        backend: `auto` is CTranslate2 where that is installed and gives the same tokens faster, else torch.

    Raises:
        ConfigError: CTranslate2 was asked for and is not installed, or does not do this.
    """
    try:
        ours = NetworkGenerator.of(model, limits, precision)
        if backend == "torch" or (backend == "auto" and not _is_ctranslate2_faster(model, precision)):
            return ours
        return _load_ctranslate2(model, limits, precision, ours)
    except UnknownModelError as error:
        if backend == "ctranslate2":
            raise ConfigError(f"serve.engine: ctranslate2 cannot decode this model: {error}") from error
        logger.info("transformers decodes: %s", error)
        return None


def _is_ctranslate2_faster(model: nn.Module, precision: Precision) -> bool:
    """Whether CTranslate2 is to be preferred: for its precisions, as docs/benchmarks.md shows; never on a GPU."""
    if precision not in ("float32", "int8") or find_spec("ctranslate2") is None:
        return False
    return is_known(model) and all(parameter.device.type == "cpu" for parameter in model.parameters())


def _load_ctranslate2(
    model: nn.Module, limits: BatchLimits, precision: Precision, ours: NetworkGenerator
) -> TokenGenerator:
    if find_spec("ctranslate2") is None:
        raise ConfigError(
            "serve.engine is ctranslate2, which is not installed", "pip install 'eagleray[ctranslate2]'"
        )
    if precision != "float32" and precision != "int8":
        raise ConfigError(
            f"serve.dtype {precision} is not for serve.engine ctranslate2", "set float32, int8 or engine: torch"
        )
    return CTranslate2Generator(model, precision, limits, ours)


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
