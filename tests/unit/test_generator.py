"""What our decoder takes over, and what it leaves to transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from random_models import marian, padded, sources
from torch import nn

from eagleray.engine.decoder import NetworkGenerator, UnknownModelError
from eagleray.engine.decoder.rules import unfollowed_settings
from eagleray.engine.decoding import DecodingOptions, GeneratingModel, generate, load_generator
from eagleray.engine.plan import BatchLimits

LIMITS = BatchLimits(8, 4096)


@pytest.mark.parametrize(
    "settings, named",
    [
        ({"no_repeat_ngram_size": 3}, "no_repeat_ngram_size"),
        ({"repetition_penalty": 1.2, "max_time": 3.0}, "max_time, repetition_penalty"),
        ({"bad_words_ids": [[5], [6, 7]]}, "bad_words_ids of several tokens"),
        ({"sequence_bias": [[[3], 1.0]]}, "sequence_bias"),
        ({"num_return_sequences": 2}, "num_return_sequences"),
    ],
)
def test_a_setting_that_is_not_followed_is_left_to_transformers(settings: dict[str, Any], named: str) -> None:
    model = marian()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(UnknownModelError, match=f"^the generation config sets {named}$"):
        NetworkGenerator.of(model, LIMITS)
    assert load_generator(model, LIMITS) is None


def test_every_setting_of_transformers_is_known_to_be_followed_or_off_by_default() -> None:
    from transformers import GenerationConfig

    defaults = GenerationConfig(decoder_start_token_id=1)
    assert unfollowed_settings(defaults.to_dict()) == []
    assert unfollowed_settings({**defaults.to_dict(), **defaults._get_default_generation_params()}) == []
    assert unfollowed_settings({**defaults.to_dict(), "a_setting_of_tomorrow": 1}) == ["a_setting_of_tomorrow"]


class Doubled(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return 2 * super().forward(input)


def replace_a_linear(model: Any) -> None:
    fc1 = model.model.decoder.layers[0].fc1
    model.model.decoder.layers[0].fc1 = Doubled(fc1.in_features, fc1.out_features)


def replace_a_forward(model: Any) -> None:
    layer = model.model.encoder.layers[0]
    layer.forward = lambda x, *args, **kwargs: x


def add_a_hook(model: Any) -> None:
    model.model.decoder.layers[1].register_forward_hook(lambda module, inputs, output: output * 2)


@pytest.mark.parametrize("change", [replace_a_linear, replace_a_forward, add_a_hook])
def test_a_model_that_was_changed_is_decoded_by_transformers_and_so_rightly(change: Any) -> None:
    model = marian()
    change(model)
    with pytest.raises(UnknownModelError):
        NetworkGenerator.of(model, LIMITS)
    ids, mask = padded(sources(5))
    expected = model.generate(input_ids=ids, attention_mask=mask, num_beams=1, max_new_tokens=6).tolist()
    assert generate(model, ids, mask, DecodingOptions(max_new_tokens=6)) == expected


def test_a_row_padded_in_front_is_left_to_transformers() -> None:
    hf_model = marian()
    generator = load_generator(hf_model, LIMITS)
    assert generator is not None
    model = GeneratingModel(hf_model, generator)
    ids, mask = padded(sources(2))
    found = generate(model, ids.flip(1), mask.flip(1), DecodingOptions(max_new_tokens=6))
    expected = hf_model.generate(input_ids=ids.flip(1), attention_mask=mask.flip(1), max_new_tokens=6)
    assert found == expected.tolist()


def test_weights_that_change_are_seen_by_the_next_call() -> None:
    model, (ids, mask) = marian(), padded(sources(4))
    before = generate(model, ids, mask, DecodingOptions(max_new_tokens=6))
    with torch.no_grad():
        model.final_logits_bias[0, 17] = 1e6
    after = generate(model, ids, mask, DecodingOptions(max_new_tokens=6))
    assert before != after
    assert {token for row in after for token in row[1:]} == {17}
