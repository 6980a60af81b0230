"""What decodes gives what transformers' `generate` gives, token for token."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
from random_models import EOS, PAD, marian, padded, sources, t5

from eagleray.engine.decoding import Backend, load_generator
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits

ROWS = sources(300, seed=2)
LIMITS = BatchLimits(max_items=32, max_tokens=100_000)  # rows enter and leave all the time
TORCH: Backend = "torch"
installed = pytest.mark.skipif(find_spec("ctranslate2") is None, reason="pip install 'eagleray[ctranslate2]'")
CTRANSLATE2 = pytest.param("ctranslate2", marks=installed)
MARIAN_BY_CTRANSLATE2 = pytest.param(marian, "ctranslate2", marks=installed)


def by_transformers(model: Any, rows: list[list[int]], options: DecodingOptions) -> list[list[int]]:
    ids, mask = padded(rows)
    found = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=options.num_beams, max_new_tokens=options.max_new_tokens,
        do_sample=False,
    )  # fmt: skip
    return [without_filling(row) for row in found.tolist()]


def without_filling(row: list[int]) -> list[int]:
    """Cut what transformers fills a batch with behind the end of an answer."""
    end = next((place for place, token in enumerate(row) if place and token == EOS), None)
    if end is not None:
        assert set(row[end + 1 :]) <= {PAD, EOS}
        return row[: end + 1]
    while row[-1] == PAD:
        row = row[:-1]
    return row


def decode(
    model: Any, rows: list[list[int]], options: DecodingOptions, backend: Backend, limits: BatchLimits = LIMITS
) -> list[list[int]]:
    generator = load_generator(model, limits, "float32", backend)
    assert generator is not None
    return generator.generate(rows, options)


def compare(
    model: Any, options: DecodingOptions, rows: list[list[int]] = ROWS, backend: Backend = TORCH
) -> list[list[int]]:
    ours = decode(model, rows, options, backend)
    assert [without_filling(row) for row in ours] == by_transformers(model, rows, options)
    return ours


@pytest.mark.parametrize("num_beams", [1, 4])
@pytest.mark.parametrize("family, backend", [(marian, TORCH), (t5, TORCH), MARIAN_BY_CTRANSLATE2])
def test_rows_of_mixed_length(family: Any, backend: Backend, num_beams: int) -> None:
    answers = compare(family(), DecodingOptions(num_beams, max_new_tokens=30), backend=backend)
    lengths = [len(answer) for answer in answers]
    assert len(set(lengths)) > 7 and max(lengths) == 31, "the model does not say enough to compare"


SETTINGS: dict[str, dict[str, Any]] = {
    "as opus-mt": {
        "bad_words_ids": [[PAD]], "forced_eos_token_id": EOS, "renormalize_logits": True, "num_beams": 6,
    },
    "first token forced": {"forced_bos_token_id": 7, "begin_suppress_tokens": [3, 4]},
    "tokens suppressed": {"suppress_tokens": [5, 9, 11], "begin_suppress_tokens": [3, EOS]},
    "last token forced": {"forced_eos_token_id": EOS},
    "not too short": {"min_length": 9},
    "new tokens wanted": {"min_new_tokens": 6},
    "several ends": {"eos_token_id": [EOS, 13]},
    "short ones preferred": {"length_penalty": -0.7},
    "long ones preferred": {"length_penalty": 2.0, "early_stopping": "never"},
    "no length penalty": {"length_penalty": 0.0, "early_stopping": "never"},
    "first ones taken": {"early_stopping": True},
}  # fmt: skip


@pytest.mark.parametrize("backend", [TORCH, CTRANSLATE2])
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_what_the_generation_config_sets_is_followed(settings: dict[str, Any], backend: Backend) -> None:
    model = marian()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    for num_beams in (1, 3):
        options = DecodingOptions(num_beams, max_new_tokens=16)
        ours = decode(model, ROWS[:40], options, backend, BatchLimits(8, 100_000))
        ids, mask = padded(ROWS[:40])
        theirs = model.generate(
            input_ids=ids, attention_mask=mask, num_beams=num_beams, max_new_tokens=16, do_sample=False
        ).tolist()
        for row, other in zip(ours, theirs, strict=True):
            assert row == other[: len(row)] and set(other[len(row) :]) <= {PAD, EOS}


@pytest.mark.parametrize("backend", [TORCH, CTRANSLATE2])
def test_one_row_alone_and_answers_of_one_token(backend: Backend) -> None:
    for num_beams in (1, 4):
        compare(marian(), DecodingOptions(num_beams, max_new_tokens=1), ROWS[:3], backend)
        compare(marian(), DecodingOptions(num_beams, max_new_tokens=20), ROWS[:1], backend)


@pytest.mark.parametrize(
    "family, changes",
    [
        (marian, {"scale_embedding": False, "activation_function": "swish", "encoder_attention_heads": 2}),
        (marian, {"share_encoder_decoder_embeddings": False, "tie_word_embeddings": False}),
        (t5, {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}),
    ],
)
def test_variants_of_the_families(family: Any, changes: dict[str, Any]) -> None:
    compare(family(**changes), DecodingOptions(max_new_tokens=12), ROWS[:50])
