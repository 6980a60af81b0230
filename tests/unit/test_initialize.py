"""Initial weights depend on (seed, parameter name) alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import MODELS, tiny_config, tiny_parts
from torch import nn

from eagleray.errors import ConfigError
from eagleray.models import build_model, initialize, materialize


def hf_model(kind: str) -> nn.Module:
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 50, "pad_token_id": 0, "eos_token_id": 1}
    match kind:
        case "marian":
            keys = MODELS["translation"]["config"]
            config = transformers.MarianConfig(**keys, **sizes, decoder_start_token_id=0)
            return transformers.MarianMTModel(config)
        case "bert":
            return transformers.BertForSequenceClassification(
                transformers.BertConfig(**MODELS["text-classification"]["config"], vocab_size=50)
            )
        case "vit":
            return transformers.ViTForImageClassification(
                transformers.ViTConfig(**MODELS["image-classification"]["config"])
            )
        case "t5":
            config = transformers.T5Config(**sizes, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
            return transformers.T5ForConditionalGeneration(config)
        case "bart":
            config = transformers.BartConfig(
                **sizes, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
                decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, bos_token_id=2,
                decoder_start_token_id=0, forced_eos_token_id=1,
            )  # fmt: skip
            return transformers.BartForConditionalGeneration(config)
    raise AssertionError(kind)


def everything(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def assert_equal(left: nn.Module, right: nn.Module) -> None:
    a, b = everything(left), everything(right)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("kind", ["marian", "bert", "vit", "t5", "bart"])
def test_a_model_built_on_meta_is_bit_equal_to_one_built_directly(kind: str) -> None:
    torch.manual_seed(1)
    direct = hf_model(kind)
    with torch.device("meta"):
        deferred = hf_model(kind)
    materialize(deferred, "cpu")
    initialize(direct, seed=7)
    torch.manual_seed(2)
    initialize(deferred, seed=7)
    assert_equal(direct, deferred)


@pytest.mark.parametrize("kind", ["marian", "bert", "vit", "t5", "bart"])
def test_the_distribution_of_every_parameter_is_the_one_transformers_chose(kind: str) -> None:
    torch.manual_seed(0)
    theirs = everything(hf_model(kind))
    ours = hf_model(kind)
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.fill_(3.0)
    initialize(ours, seed=0)
    for name, tensor in everything(ours).items():
        reference = theirs[name]
        if tensor.numel() < 2 or reference.float().std() == 0 or not tensor.is_floating_point():
            assert torch.equal(tensor, reference), name
        else:
            # Samples of one distribution: same mean and spread, within five standard errors.
            error = 5 * float(reference.std()) / tensor.numel() ** 0.5
            assert abs(float(tensor.mean() - reference.mean())) < 2 * error, name
            assert abs(float(tensor.std() - reference.std())) < 2 * error, name


def test_marian_keeps_its_sinusoidal_positions_and_ties_its_embeddings() -> None:
    _, _, model = tiny_parts(tiny_config())
    marian: Any = model
    positions = marian.model.encoder.embed_positions.weight
    assert torch.allclose(positions[3, 0], torch.sin(torch.tensor(3.0)))
    assert torch.allclose(positions[0, 8:], torch.ones(8))
    assert not positions.requires_grad
    assert marian.lm_head.weight is marian.model.shared.weight


def test_the_seed_decides_and_the_random_state_of_the_process_neither_counts_nor_changes() -> None:
    first, second, third = hf_model("bert"), hf_model("bert"), hf_model("bert")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    initialize(first, seed=0)
    assert torch.equal(torch.get_rng_state(), before)
    initialize(second, seed=0)
    initialize(third, seed=1)
    assert_equal(first, second)
    assert not torch.equal(first.classifier.weight, third.classifier.weight)  # type: ignore[union-attr, arg-type]


class Plain(nn.Module):
    def __init__(self, reverse: bool = False) -> None:
        super().__init__()
        for name in ("out", "body") if reverse else ("body", "out"):
            self.add_module(name, nn.Linear(4, 4))
        self.scale = nn.Parameter(torch.empty(4))
        self.attention = nn.MultiheadAttention(4, 2)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.body.weight)  # type: ignore[arg-type]
        nn.init.trunc_normal_(self.scale)


def test_a_plain_module_is_set_by_reset_parameters_whatever_the_order_of_building() -> None:
    first, second = Plain(), Plain(reverse=True)
    with torch.device("meta"):
        third = Plain()
    materialize(third, "cpu")
    for model in (first, second, third):
        initialize(model, seed=3)
    assert torch.allclose(first.body.weight @ first.body.weight.T, torch.eye(4), atol=1e-6)  # type: ignore[operator, union-attr]
    assert {name: tensor.tolist() for name, tensor in everything(first).items()} == {
        name: tensor.tolist() for name, tensor in everything(second).items()
    }
    assert_equal(first, third)


def test_equal_layers_of_different_names_get_different_weights() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    initialize(model, seed=0)
    assert not torch.equal(model[0].weight, model[1].weight)


class Bare(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))


def test_a_module_that_cannot_be_set_is_named() -> None:
    with pytest.raises(ConfigError, match=r"cannot initialise 0 \(Bare\): it has the parameters weight"):
        initialize(nn.Sequential(Bare()), seed=0)


def test_no_seed_leaves_random_weights_out_but_sets_what_no_checkpoint_holds() -> None:
    model: Any = hf_model("bert")
    model.classifier.weight.data.fill_(9.0)
    model.bert.embeddings.position_ids.fill_(9)
    initialize(model, None)
    assert (model.classifier.weight == 9.0).all()
    assert model.bert.embeddings.position_ids[0, :3].tolist() == [0, 1, 2]


def test_two_builds_of_one_file_are_equal() -> None:
    config = tiny_config()
    _, processor, first = tiny_parts(config)
    assert_equal(first, build_model(config, processor, "cpu"))
