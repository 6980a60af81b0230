"""Models of the families that are built from scratch, on `meta`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from eagleray.config.families import parse_family
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray.tasks import Processor, task_class


def build_family(config: RunConfig, processor: Any) -> nn.Module:
    """Build `model.family` on `meta`, with what follows from the data: vocabulary, special tokens, labels.

    Raises:
        ConfigError: The family is made for another task, or too short for the lengths under `data`.
    """
    parsed = parse_family(config.model)
    if task_class(config.task).head != task_class(parsed.task).head:
        raise ConfigError(
            f"model.family {config.model.family} is made for the task {parsed.task}, not {config.task}"
        )
    keys = parsed.model_dump()
    _check_positions(config, keys)
    assert config.model.family is not None
    with torch.device("meta"):
        model = _BUILDERS[config.model.family](keys, processor)
    if task_class(parsed.task).head == "seq2seq-lm":
        hf_model: Any = model
        hf_model.generation_config.max_new_tokens = config.data.max_target_length
    return model


def label_keys(processor: Processor) -> dict[str, Any]:
    """Return the class names as Hugging Face's configs hold them."""
    return {
        "id2label": dict(enumerate(processor.labels)),
        "label2id": {label: number for number, label in enumerate(processor.labels)},
    }


def _marian(keys: Mapping[str, Any], processor: Any) -> nn.Module:
    from transformers import MarianConfig, MarianMTModel

    return MarianMTModel(MarianConfig(**keys, **_seq2seq_keys(processor), forced_eos_token_id=None))  # type: ignore[no-any-return]


def _t5(keys: Mapping[str, Any], processor: Any) -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(T5Config(**keys, **_seq2seq_keys(processor)))  # type: ignore[no-any-return]


def _bert(keys: Mapping[str, Any], processor: Any) -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig(**keys, **_text_keys(processor)))  # type: ignore[no-any-return]


def _distilbert(keys: Mapping[str, Any], processor: Any) -> nn.Module:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    return DistilBertForSequenceClassification(DistilBertConfig(**keys, **_text_keys(processor)))  # type: ignore[no-any-return]


def _vit(keys: Mapping[str, Any], processor: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**keys, **label_keys(processor)))  # type: ignore[no-any-return]


def _seq2seq_keys(processor: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    return {
        "vocab_size": len(tokenizer),
        "pad_token_id": int(tokenizer.pad_token_id),
        "eos_token_id": int(tokenizer.eos_token_id),
        "decoder_start_token_id": processor.settings.decoder_start_token_id,
    }


def _text_keys(processor: Any) -> dict[str, Any]:
    tokenizer = processor.tokenizer
    return {"vocab_size": len(tokenizer), "pad_token_id": int(tokenizer.pad_token_id), **label_keys(processor)}


def _check_positions(config: RunConfig, keys: Mapping[str, Any]) -> None:
    """Refuse inputs that are longer than the learned or tabulated positions; relative ones have no end."""
    num_positions = keys.get("max_position_embeddings")
    lengths = {"max_source_length": config.data.max_source_length}
    if task_class(config.task).head == "seq2seq-lm":
        lengths["max_target_length"] = config.data.max_target_length
    for key, length in lengths.items():
        if num_positions is not None and length > num_positions:
            raise ConfigError(
                f"data.{key} is {length}, but model.config.max_position_embeddings is {num_positions}"
            )


_BUILDERS: Mapping[str, Callable[[Mapping[str, Any], Any], nn.Module]] = {
    "marian": _marian,
    "t5": _t5,
    "bert": _bert,
    "distilbert": _distilbert,
    "vit": _vit,
}
