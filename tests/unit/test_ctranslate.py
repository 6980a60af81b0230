"""CTranslate2 behind our interface; needs the extra `eagleray[ctranslate2]`."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from random_models import EOS, PAD, marian, sources, t5

from eagleray.engine.ctranslate import CTranslate2Generator
from eagleray.engine.decoder import NetworkGenerator
from eagleray.engine.decoding import load_generator
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits
from eagleray.errors import ConfigError

LIMITS = BatchLimits(16, 4096)
ROWS = sources(60)
installed = pytest.mark.skipif(find_spec("ctranslate2") is None, reason="pip install 'eagleray[ctranslate2]'")


def both(**settings: Any) -> tuple[CTranslate2Generator, NetworkGenerator]:
    model = marian()
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    ours = NetworkGenerator.of(model, LIMITS)
    return CTranslate2Generator(model, "float32", LIMITS, ours), ours


@installed
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"bad_words_ids": [[PAD]], "suppress_tokens": [4, 7]},
        {"min_new_tokens": 5},
        {"forced_eos_token_id": EOS},
        {"forced_bos_token_id": 9, "begin_suppress_tokens": [3]},
        {"eos_token_id": [EOS, 13]},
    ],
)
@pytest.mark.parametrize("num_beams", [1, 3])
def test_answers_are_those_of_our_own_decoder(settings: dict[str, Any], num_beams: int) -> None:
    theirs, ours = both(**settings)
    options = DecodingOptions(num_beams, max_new_tokens=14)
    assert theirs.generate(ROWS, options) == ours.generate(ROWS, options)


@installed
def test_the_model_is_left_as_it_is() -> None:
    model = marian()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert isinstance(load_generator(model, LIMITS, "int8"), CTranslate2Generator)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


@installed
def test_threads_of_torch_are_left_as_they_are_and_rows_are_shared_out_among_as_many() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        first, ours = both()
        second, _ = both()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert first._num_threads == second._num_threads == 3
    options = DecodingOptions(max_new_tokens=14)
    for rows in (ROWS, ROWS[:1], ROWS[:2]):
        assert second.generate(rows, options) == ours.generate(rows, options)


@installed
def test_auto_takes_it_for_its_precisions_and_marian_only() -> None:
    for precision in ("float32", "int8"):
        assert isinstance(load_generator(marian(), LIMITS, precision), CTranslate2Generator)
        assert isinstance(load_generator(marian(), LIMITS, precision, "torch"), NetworkGenerator)
    assert isinstance(load_generator(marian(), LIMITS, "bfloat16"), NetworkGenerator)
    assert isinstance(load_generator(t5(), LIMITS, "int8"), NetworkGenerator)
    with pytest.raises(ConfigError, match=r"serve\.dtype bfloat16 is not for serve\.engine ctranslate2"):
        load_generator(marian(), LIMITS, "bfloat16", "ctranslate2")
    with pytest.raises(ConfigError, match="ctranslate2 cannot decode this model: it is no MarianMTModel"):
        load_generator(t5(), LIMITS, "int8", "ctranslate2")


@pytest.mark.skipif(find_spec("ctranslate2") is not None, reason="it is installed")
def test_asked_for_and_not_installed_it_says_how_to_install_it() -> None:
    with pytest.raises(ConfigError, match=r"(?s)not installed.*pip install 'eagleray\[ctranslate2\]'"):
        load_generator(marian(), LIMITS, "int8", "ctranslate2")
    assert isinstance(load_generator(marian(), LIMITS, "int8"), NetworkGenerator)
