"""Our family configs against transformers' own classes."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from eagleray.config.families import (
    FAMILIES,
    BertFamily,
    DistilBertFamily,
    MarianFamily,
    T5Family,
    ViTFamily,
    parse_family,
)
from eagleray.config.schema import ModelConfig

# Keys of transformers that follow from the data or from what the family is, so that no file may set them.
DERIVED = {
    "marian": {
        "vocab_size", "decoder_vocab_size", "decoder_start_token_id", "pad_token_id", "eos_token_id",
        "bos_token_id", "forced_eos_token_id", "share_encoder_decoder_embeddings", "tie_word_embeddings",
        "is_decoder", "is_encoder_decoder", "use_cache",
        # Drops whole layers at random: their parameters get no gradient, which DDP forbids.
        "encoder_layerdrop", "decoder_layerdrop",
    },
    "t5": {
        "vocab_size", "decoder_start_token_id", "pad_token_id", "eos_token_id", "bos_token_id", "is_decoder",
        "is_encoder_decoder", "tie_word_embeddings", "use_cache",
        # It belongs to another head than the translator's.
        "classifier_dropout",
    },
    "bert": {
        "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "type_vocab_size", "use_cache",
        "is_decoder", "add_cross_attention", "tie_word_embeddings",
    },
    # `qa_dropout` belongs to another head than the classifier.
    "distilbert": {
        "vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "qa_dropout",
    },
    # The pooler and the stride belong to other heads than the classifier.
    "vit": {"encoder_stride", "pooler_output_size", "pooler_act"},
}  # fmt: skip

# Defaults that are our own: sizes for a laptop, and Marian as the published Marian models are configured.
OWN_DEFAULTS = {
    "marian": {
        "d_model", "encoder_layers", "decoder_layers", "encoder_attention_heads", "decoder_attention_heads",
        "encoder_ffn_dim", "decoder_ffn_dim", "max_position_embeddings", "activation_function", "scale_embedding",
    },
    "t5": {"d_model", "d_ff", "num_layers", "num_decoder_layers", "num_heads"},
    "bert": {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"},
    "distilbert": {"dim", "n_layers", "n_heads", "hidden_dim"},
    "vit": {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"},
}  # fmt: skip


def transformers_class(family: str) -> Any:
    import transformers

    names = {"marian": "Marian", "t5": "T5", "bert": "Bert", "distilbert": "DistilBert", "vit": "ViT"}
    return getattr(transformers, f"{names[family]}Config")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_keys_are_those_of_transformers_without_the_derived_ones(family: str) -> None:
    cls = transformers_class(family)
    theirs = {key for key in cls.__annotations__ if key not in {"model_type", "attribute_map"}}
    theirs = {key for key in theirs if not key.startswith("keys_to_ignore")}
    assert set(FAMILIES[family].model_fields) == theirs - DERIVED[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_defaults_are_those_of_transformers_but_for_our_own(family: str) -> None:
    ours, theirs = FAMILIES[family]().model_dump(), transformers_class(family)()
    differing = {key for key, value in ours.items() if value != getattr(theirs, key)}
    assert differing == OWN_DEFAULTS[family]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_misspelt_key_is_an_error(family: str) -> None:
    with pytest.raises(ValidationError, match="Extra inputs are not permitted"):
        parse_family(ModelConfig(family=family, config={"d_modle": 3}))


@pytest.mark.parametrize(
    "cls, config, message",
    [
        (MarianFamily, {"d_model": 130, "encoder_attention_heads": 4}, "no multiple of encoder_attention_heads 4"),
        (MarianFamily, {"d_model": 129}, "d_model must be even"),
        (BertFamily, {"hidden_size": 10, "num_attention_heads": 3}, "hidden_size 10 is no multiple"),
        (DistilBertFamily, {"dim": 10, "n_heads": 3}, "dim 10 is no multiple of n_heads 3"),
        (T5Family, {"relative_attention_max_distance": 16}, "16 must be above half of .*num_buckets 32"),
        (ViTFamily, {"image_size": 9, "patch_size": 2}, "image_size 9 is no multiple of patch_size 2"),
    ],
)
def test_sizes_that_do_not_fit_are_an_error(cls: type, config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        cls(**config)
