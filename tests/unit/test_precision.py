"""Lower precision changes little, whatever the model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from copying_model import Size, copying_model
from copying_model import sources as copied_sources
from fake_checkpoint import tiny_checkpoint
from tiny_models import ROWS, tiny_config, tiny_parts
from torch import nn

from eagleray.config.schema import ServeConfig
from eagleray.engine import BatchLimits, Engine, ItemError, load_engine
from eagleray.engine.decoder.linear import make_linear
from eagleray.engine.decoding import load_generator
from eagleray.engine.options import DecodingOptions
from eagleray.engine.precision import LowLinear, lower_precision
from eagleray.errors import ConfigError

LIMITS = BatchLimits(8, 4096)


@pytest.mark.parametrize("precision, tolerance", [("bfloat16", 0.01), ("int8", 0.02)])
def test_a_product_is_near_the_exact_one(precision: Any, tolerance: float) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(48, 32) * torch.rand(48, 1) * 9, torch.randn(48), torch.randn(5, 32)
    exact = make_linear(weight, bias)(x)
    near = make_linear(weight, bias, precision)(x.bfloat16() if precision == "bfloat16" else x).float()
    assert 0 < float((near - exact).norm() / exact.norm()) < tolerance


def test_rows_of_zeros_are_quantised_to_zeros() -> None:
    found = make_linear(torch.zeros(3, 8), torch.tensor([1.0, 2.0, 3.0]), "int8")(torch.ones(2, 8))
    assert found.tolist() == [[1.0, 2.0, 3.0]] * 2


@pytest.mark.parametrize("precision", ["bfloat16", "int8"])
@pytest.mark.parametrize("task", ["text-classification", "image-classification"])
def test_classes_in_lower_precision(task: str, precision: Any) -> None:
    checkpoint, _ = tiny_checkpoint(task)
    exact = load_engine(checkpoint, limits=LIMITS)
    lower = load_engine(checkpoint, limits=LIMITS, serve=ServeConfig(dtype=precision))
    assert [type(module) for module in lower.model.modules()].count(LowLinear) >= 6
    items = [{column: row[column] for column in exact.task.input_columns} for row in ROWS[task]]
    pairs = list(zip(exact.answer(items), lower.answer(items), strict=True))
    assert pairs
    for one, other in pairs:
        assert not isinstance(one, ItemError) and not isinstance(other, ItemError)
        assert one["scores"] == pytest.approx(other["scores"], abs=0.02)
    assert any(one != other for one, other in pairs), "nothing was lowered"


def test_a_module_in_two_places_is_replaced_once_and_other_kinds_stay() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"one": shared, "two": shared, "attention": nn.MultiheadAttention(4, 2)})
    lower_precision(model, "int8")
    assert isinstance(model["one"], LowLinear) and model["one"] is model["two"]
    attention: Any = model["attention"]
    assert attention.out_proj.weight.shape == (4, 4) and not isinstance(attention.out_proj, LowLinear)


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_a_translator_that_is_sure_of_its_answers_gives_the_same_in_every_precision(precision: Any) -> None:
    size = Size(width=128, num_layers=1, vocab_size=300)
    generator = load_generator(copying_model(size, longest=20), LIMITS, precision, "torch")
    assert generator is not None
    rows = copied_sources(size, 30, longest=20)
    answers = generator.generate(rows, DecodingOptions(max_new_tokens=40))
    assert [answer[1:] for answer in answers] == rows


@pytest.mark.parametrize(
    "dtype, device, message",
    [("float16", "cpu", "float16 is for GPUs, not for CPUs"), ("int8", "meta", "int8 is for CPUs, not for meta")],
)
def test_a_precision_that_the_device_does_not_have_is_refused(dtype: Any, device: str, message: str) -> None:
    task, processor, model = tiny_parts(tiny_config())
    with pytest.raises(ConfigError, match=message):
        Engine(model, task, processor, ref="x@r1-step-00000001", limits=LIMITS, device=device, dtype=dtype)


def test_an_engine_for_translators_is_refused_for_a_classifier() -> None:
    checkpoint, _ = tiny_checkpoint("text-classification")
    with pytest.raises(ConfigError, match=r"serve\.engine ctranslate2 is for models that generate text"):
        load_engine(checkpoint, serve=ServeConfig(engine="ctranslate2"))
