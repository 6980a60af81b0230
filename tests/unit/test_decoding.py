"""Generating target tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import PAIRS, tiny_config, tiny_parts

from eagleray.engine.decoding import DecodingOptions, generate


@pytest.mark.parametrize("own, asked, first", [(7, None, 7), (7, 9, 9), (None, 9, 9)])
def test_the_first_token_is_the_one_asked_for_else_the_models_own(
    own: int | None, asked: int | None, first: int
) -> None:
    task, processor, model = tiny_parts(tiny_config())
    hf_model: Any = model.eval()
    hf_model.generation_config.forced_bos_token_id = own
    batch = task.collate([task.encode(row, processor).features for row in PAIRS], processor)
    options = DecodingOptions(max_new_tokens=3, forced_bos_token_id=asked)
    rows = generate(model, batch["input_ids"], batch["attention_mask"], options)
    start = hf_model.config.decoder_start_token_id
    assert [row[:2] for row in rows] == [[start, first]] * len(PAIRS)


def test_an_answer_has_no_more_tokens_than_asked_for_and_is_not_random() -> None:
    task, processor, model = tiny_parts(tiny_config())
    batch = task.collate([task.encode(row, processor).features for row in PAIRS], processor)
    runs = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        inputs = batch["input_ids"], batch["attention_mask"]
        runs.append(generate(model.eval(), *inputs, DecodingOptions(max_new_tokens=5)))
    assert runs[0] == runs[1]
    assert max(len(row) for row in runs[0]) == 6
