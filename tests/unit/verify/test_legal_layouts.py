"""Which layouts `verify` tries, and the file as each of them sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray_jobs.verify.dropout import switch_off_dropout
from eagleray_jobs.verify.layouts import config_for_check, config_in, layouts_up_to


def make_config(parallel: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    return RunConfig.model_validate(
        {
            "name": "m",
            "task": "translation",
            "model": {"family": "marian"},
            "data": {"source": "cldr-en-fr"},
            "train": {"max_steps": 9} | train,
            "parallel": parallel or {},
        }
    )


def test_every_layout_of_up_to_four_workers_is_tried_the_simple_ones_first() -> None:
    spelled = [str(layout) for layout in layouts_up_to(4)]
    assert spelled[:8] == ["ddp2", "fsdp2", "tp2", "pp2", "ddp3", "fsdp3", "tp3", "pp3"]
    assert sorted(spelled[8:]) == sorted(
        "ddp4 fsdp4 tp4 pp4 hsdp2x2 ddp2.tp2 fsdp2.tp2 pp2.ddp2 pp2.fsdp2 pp2.tp2".split()
    )
    assert len(layouts_up_to(8)) == 4 + 4 + 10 + 4 + 16 + 4 + 20


def test_the_check_computes_in_float32_from_new_weights_and_says_so() -> None:
    config, notes = config_for_check(make_config(bf16=True, init_from="m@best", eval_steps=1), 3)
    train = config.train
    assert train is not None
    assert (train.bf16, train.init_from, train.stop_at_step, train.max_steps) == (False, None, 3, 9)
    assert len(notes) == 2 and "bf16" in notes[0] and "init_from" in notes[1]
    assert config_for_check(make_config(), 3)[1] == ()


def test_what_belongs_to_a_degree_is_left_out_of_layouts_without_it() -> None:
    file = make_config(
        {
            "pipeline_parallel_degree": 2,
            "tensor_parallel_degree": 2,
            "pipeline_parallel_split": [2, 4],
            "sequence_parallel": True,
        }
    )
    same = config_in(file, Layout(pipeline=2, tensor=2)).parallel
    other = config_in(file, Layout(pipeline=3)).parallel
    assert (same.pipeline_parallel_split, same.sequence_parallel) == ([2, 4], True)
    assert (other.pipeline_parallel_split, other.sequence_parallel) == (None, False)


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.3)
        self.attention_dropout = 0.2
        self.layerdrop = 0.1
        self.eps = 0.5


def test_dropout_is_switched_off_wherever_a_model_keeps_it() -> None:
    model = nn.Sequential(Layer(), nn.TransformerEncoderLayer(4, 2, 8, dropout=0.4))
    model.train()
    assert switch_off_dropout(model) == 0.4
    assert model[0].eps == 0.5
    x = torch.randn(2, 3, 4)
    assert torch.equal(model[1](x), model[1](x))
    assert switch_off_dropout(model) == 0.0
