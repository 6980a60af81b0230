"""Low-rank adapters: what is trained, what it starts from, and how it becomes part of the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_checkpoint import FakeCheckpoint
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from tiny_models import PAIRS, ROWS, save_distilbert, save_t5, tiny_config, tiny_parts
from torch import nn

from eagleray.config.crosschecks import cross_problems
from eagleray.config.schema import AdapterConfig
from eagleray.engine import load_engine
from eagleray.engine.decoder import NetworkGenerator, UnknownModelError
from eagleray.engine.plan import BatchLimits
from eagleray.errors import CheckpointDamagedError, ConfigError
from eagleray.lora import LoraLinear, add_adapter, is_factor, merged
from eagleray.models import build_model, initialize, materialize, model_files, pretrained_base, restore_model
from eagleray.tasks import load_task
from eagleray_jobs.adapter_files import write_adapter

LORA: dict[str, Any] = {"rank": 2, "alpha": 6.0, "target_modules": ["q", "DenseReluDense.wo"]}


def adapted(directory: Path, task: str = "translation", **adapter: Any) -> tuple[Any, Any, Any]:
    """Return the file, the processor and the model of an adapter over a pretrained checkpoint."""
    config = tiny_config(task, model={"pretrained": str(directory), "adapter": {**LORA, **adapter}})
    processor = load_task(config).build_processor(iter(ROWS[task]))
    return config, processor, build_model(config, processor, "cpu")


def trained(model: nn.Module) -> nn.Module:
    """Give every trained parameter another value."""
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def trained_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def version_of_adapter(directory: Path, **adapter: Any) -> tuple[FakeCheckpoint, nn.Module]:
    config, processor, model = adapted(directory, commit="adapter", **adapter)
    files = model_files(model, config, processor) | pretrained_base(config).to_files()
    return FakeCheckpoint(config, files, trained_tensors(trained(model))), model.eval()


def test_a_new_adapter_changes_no_answer_and_is_all_that_is_trained(tmp_path: Path) -> None:
    directory = save_t5(tmp_path)
    config, processor, model = adapted(directory)
    plain = build_model(tiny_config(model={"pretrained": str(directory)}), processor, "cpu")
    task = load_task(config)
    batch = task.collate([task.encode(row, processor).features for row in PAIRS], processor)
    assert torch.equal(task.loss(model, batch).total, task.loss(plain, batch).total)
    names = set(trained_tensors(model))
    assert "encoder.block.0.layer.0.SelfAttention.q.lora_A.weight" in names
    assert "decoder.block.0.layer.2.DenseReluDense.wo.lora_B.weight" in names
    assert all(is_factor(name) for name in names) and len(names) == 2 * (3 + 2)
    assert {name for name, _ in model.named_parameters() if not is_factor(name)} == set(
        dict(plain.named_parameters())
    )


def test_the_first_weights_depend_on_the_seed_and_the_name_alone(tmp_path: Path) -> None:
    _, _, first = adapted(save_t5(tmp_path))
    torch.manual_seed(9)
    _, _, second = adapted(tmp_path)
    deferred = restore_model(*plain_files(tmp_path)).to("meta")
    add_adapter(deferred, AdapterConfig(**LORA))
    materialize(deferred, "cpu")
    initialize(deferred, 0)
    for name, tensor in trained_tensors(first).items():
        assert torch.equal(tensor, second.get_parameter(name)), name
        assert torch.equal(tensor, deferred.get_parameter(name)), name
        assert (tensor == 0).all() == name.endswith("lora_B.weight")


def plain_files(directory: Path) -> tuple[Any, dict[str, bytes]]:
    config = tiny_config(model={"pretrained": str(directory)})
    processor = load_task(config).build_processor(iter(PAIRS))
    return config, model_files(build_model(config, processor, "cpu"), config, processor)


def test_merged_weights_are_the_base_and_the_scaled_product_bit_for_bit(tmp_path: Path) -> None:
    _, _, model = adapted(save_t5(tmp_path))
    trained(model)
    found = merged(dict(model.named_parameters()), 3.0)
    assert not any(is_factor(name) for name in found)
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear):
            expected = module.weight + 3.0 * (module.lora_B.weight @ module.lora_A.weight)
            assert torch.equal(found[f"{name}.weight"], expected)
            x = torch.randn(3, module.in_features)
            torch.testing.assert_close(module(x), x @ expected.T)


def test_an_adapter_alone_answers_with_its_base(tmp_path: Path) -> None:
    checkpoint, model = version_of_adapter(save_t5(tmp_path))
    engine = load_engine(checkpoint)
    weights = dict(engine.model.named_parameters())
    expected = merged(dict(model.named_parameters()), 3.0)
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_an_adapter_of_other_weights_is_refused_with_both_hashes(tmp_path: Path) -> None:
    checkpoint, _ = version_of_adapter(save_t5(tmp_path))
    path = tmp_path / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigError, match=r"holds an adapter of weights with SHA-256 [0-9a-f]{64}, but those of"):
        load_engine(checkpoint)


def test_an_adapter_whose_base_is_gone_says_so(tmp_path: Path) -> None:
    checkpoint, _ = version_of_adapter(save_t5(tmp_path / "base"))
    (tmp_path / "base").rename(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="holds an adapter alone, and its base cannot be opened"):
        load_engine(checkpoint)


def test_an_adapter_that_does_not_name_its_base_is_damaged(tmp_path: Path) -> None:
    checkpoint, _ = version_of_adapter(save_t5(tmp_path))
    checkpoint._files.pop("eagleray_base.json")
    with pytest.raises(CheckpointDamagedError, match="which names its base"):
        load_engine(checkpoint)


def test_a_new_head_must_be_trained_with_the_adapter(tmp_path: Path) -> None:
    directory = save_distilbert(tmp_path, ["good", "bad"])
    lora = {"target_modules": ["q_lin"]}
    with pytest.raises(ConfigError, match=r"does not hold classifier\.bias, classifier\.weight") as error:
        adapted(directory, "text-classification", **lora)
    assert "modules_to_save: classifier" in str(error.value)
    _, _, model = adapted(directory, "text-classification", **lora, modules_to_save=["classifier"])
    whole = {name for name in trained_tensors(model) if not is_factor(name)}
    assert whole == {"classifier.weight", "classifier.bias"}


@pytest.mark.parametrize(
    "adapter, message",
    [
        ({"target_modules": ["query"]}, r"target_modules: 'query' matches none of the \d+ Linear modules"),
        ({"modules_to_save": ["head"]}, "modules_to_save: 'head' matches none"),
        ({"target_modules": ["lm_head"]}, "the weight of lm_head is tied to another module"),
    ],
)
def test_what_does_not_fit_the_model_is_refused(tmp_path: Path, adapter: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        adapted(save_t5(tmp_path), **adapter)


def test_an_adapted_head_is_not_decoded_without_its_adapter(tmp_path: Path) -> None:
    path = save_t5(tmp_path) / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["shared.weight"] + 1.0}, path, metadata={"format": "pt"})
    _, _, model = adapted(tmp_path, target_modules=["lm_head"])
    with pytest.raises(UnknownModelError, match="LoraLinear"):
        NetworkGenerator.of(model.eval(), BatchLimits())


@pytest.mark.parametrize("adapter", [{}, {**LORA, "rank": 0}, {**LORA, "rang": 2}, {**LORA, "type": "lorra"}])
def test_a_section_that_is_wrong_is_refused(adapter: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        AdapterConfig.model_validate(adapter)


def test_an_adapter_is_committed_alone_only_where_its_base_can_be_found_again() -> None:
    alone = {**LORA, "commit": "adapter"}
    seeded = tiny_config(model={"family": "t5", "adapter": alone})
    train = {"max_steps": 1, "init_from": "x"}
    other = tiny_config(model={"pretrained": "somewhere", "adapter": alone}, train=train)
    assert ["comes from the seed" in problem.message for problem in cross_problems(seeded)] == [True]
    assert ["comes from train.init_from" in problem.message for problem in cross_problems(other)] == [True]
    assert cross_problems(tiny_config(model={"pretrained": "somewhere", "adapter": alone})) == []
    assert cross_problems(tiny_config(model={"family": "t5", "adapter": LORA})) == []


def test_the_files_of_an_adapter_bear_the_names_that_peft_gives_them(tmp_path: Path) -> None:
    directory = save_distilbert(tmp_path, ["good", "bad"])
    lora = {"commit": "adapter", "target_modules": ["q_lin"], "modules_to_save": ["classifier"]}
    config, processor, model = adapted(directory, "text-classification", **lora)
    files = model_files(model, config, processor) | pretrained_base(config).to_files()
    checkpoint = FakeCheckpoint(config, files, trained_tensors(trained(model)))
    write_adapter(checkpoint, load_engine(checkpoint).model, tmp_path / "adapter")  # type: ignore[arg-type]
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    target = "distilbert.transformer.layer.0.attention.q_lin"
    # peft takes every module for saved whole whose name ends like one of these.
    heads = [f"{module}.{key}" for module in ("classifier", "pre_classifier") for key in ("weight", "bias")]
    names = [f"{target}.lora_A.weight", f"{target}.lora_B.weight", *heads]
    assert tensors.keys() == {f"base_model.model.{name}" for name in names}
    trained_head = model.classifier.weight  # type: ignore[union-attr]
    assert torch.equal(tensors["base_model.model.classifier.weight"], trained_head)
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "SEQ_CLS",
        "base_model_name_or_path": str(directory),
        "r": 2,
        "lora_alpha": 6.0,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": [target],
        "modules_to_save": ["classifier"],
    }


@pytest.mark.filterwarnings(
    "ignore:.is_gradient_checkpointing:FutureWarning"
)  # peft reads what transformers renamed
@pytest.mark.parametrize("task", ["translation", "text-classification"])
def test_peft_opens_an_exported_adapter_and_computes_what_we_do(tmp_path: Path, task: str) -> None:
    import transformers
    from peft import PeftModel

    if task == "translation":
        directory = save_t5(tmp_path / "base")
        lora, auto = {}, transformers.AutoModelForSeq2SeqLM
    else:
        labels = sorted({row["label"] for row in ROWS[task]})
        directory = save_distilbert(tmp_path / "base", labels)
        lora = {"target_modules": ["q_lin"], "modules_to_save": ["classifier"]}
        auto = transformers.AutoModelForSequenceClassification
    config, processor, model = adapted(directory, task, commit="adapter", **lora)
    files = model_files(model, config, processor) | pretrained_base(config).to_files()
    checkpoint = FakeCheckpoint(config, files, trained_tensors(trained(model)))
    ours = load_engine(checkpoint).model
    write_adapter(checkpoint, ours, tmp_path / "adapter")  # type: ignore[arg-type]

    theirs = PeftModel.from_pretrained(auto.from_pretrained(directory), str(tmp_path / "adapter")).eval()
    inputs = {"input_ids": torch.arange(3, 15).view(2, 6), "attention_mask": torch.ones(2, 6, dtype=torch.long)}
    if task == "translation":
        inputs["decoder_input_ids"] = inputs["input_ids"][:, :4]
    with torch.no_grad():
        expected, found = theirs(**inputs).logits, ours.eval()(**inputs).logits
        plain = auto.from_pretrained(directory).eval()(**inputs).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert (expected - plain).abs().max() > 1e-3


def test_an_adapter_over_a_family_is_built_like_any_other() -> None:
    model = {"family": "bert", "config": {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}}
    adapter = {"rank": 2, "target_modules": ["query"]}
    _, _, found = tiny_parts(tiny_config("text-classification", model={**model, "adapter": adapter}))
    _, _, plain = tiny_parts(tiny_config("text-classification", model=model))
    assert len(trained_tensors(found)) == 4
    assert all(torch.equal(p, found.get_parameter(name)) for name, p in plain.named_parameters())
