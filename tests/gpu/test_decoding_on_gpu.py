"""One GPU decodes: the tokens of transformers in float32, and a model that copies copies in every precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copying_model import EOS, PAD, Size, copying_model, sources

from eagleray.engine.decoder import NetworkGenerator
from eagleray.engine.decoding import load_generator
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

DEVICE = "cuda"
SIZE, LONGEST = Size(width=128, num_layers=2, vocab_size=500), 40
LIMITS = BatchLimits(32, 100_000)
OPTIONS = DecodingOptions(max_new_tokens=LONGEST + 8)
ROWS = sources(SIZE, 200, LONGEST)


def by_transformers(model: Any, num_beams: int) -> list[list[int]]:
    longest = max(map(len, ROWS))
    ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in ROWS], device=DEVICE)
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in ROWS], device=DEVICE)
    found = model.generate(
        input_ids=ids, attention_mask=mask, num_beams=num_beams, do_sample=False,
        max_new_tokens=OPTIONS.max_new_tokens,
    )  # fmt: skip
    return [row[: row.index(EOS, 1) + 1] for row in found.tolist()]


@pytest.mark.parametrize("num_beams", [1, 4])
def test_tokens_are_those_of_transformers(num_beams: int) -> None:
    model = copying_model(SIZE, LONGEST).to(DEVICE)
    generator = load_generator(model, LIMITS)
    assert isinstance(generator, NetworkGenerator), "CTranslate2 is for CPUs"
    with torch.inference_mode():
        ours = generator.generate(ROWS, DecodingOptions(num_beams, OPTIONS.max_new_tokens))
        assert ours == by_transformers(model, num_beams)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_precision_copies(precision: Any) -> None:
    generator = load_generator(copying_model(SIZE, LONGEST).to(DEVICE), LIMITS, precision)
    assert generator is not None
    with torch.inference_mode():
        found = generator.generate(ROWS, OPTIONS)
    assert [answer[1:] for answer in found] == ROWS
