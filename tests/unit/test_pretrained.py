"""Pretrained checkpoints, factories and frozen parameters."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_checkpoint import FakeCheckpoint, weights
from safetensors.torch import load_file, save_file
from tiny_models import IMAGES, PAIRS, TEXTS, save_distilbert, save_t5, save_vit, tiny_config

from eagleray.engine import Engine, load_engine
from eagleray.errors import ConfigError
from eagleray.models import build_model, model_files, restore_model
from eagleray.tasks import Example, Processor, Task, load_task


def open_parts(task: str, rows: list[Example], **model: Any) -> tuple[Task, Processor, Any]:
    config = tiny_config(task, model=model)
    loaded = load_task(config)
    processor = loaded.build_processor(iter(rows))
    return loaded, processor, build_model(config, processor, "cpu")


def committed(task: Task, processor: Processor, model: torch.nn.Module) -> Engine:
    """Store a model and load it again, without the directory that it came from."""
    files = model_files(model, task.config, processor)
    return load_engine(FakeCheckpoint(task.config, files, weights(model)))


def test_a_pretrained_translator_keeps_its_weights_prefix_and_tokens(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    directory = save_t5(tmp_path / "t5")
    task, processor, model = open_parts("translation", PAIRS, pretrained=str(directory))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(directory).eval()
    assert all(torch.equal(p, dict(theirs.named_parameters())[name]) for name, p in model.named_parameters())

    tokenizer = AutoTokenizer.from_pretrained(directory)
    ids = tokenizer("translate: one hour", return_tensors="pt").input_ids
    expected = tokenizer.decode(theirs.generate(ids, max_new_tokens=6, num_beams=1)[0], skip_special_tokens=True)
    shutil.rmtree(directory)
    answer = committed(task, processor, model).answer([{"source": "one hour"}], {"max_new_tokens": 6})
    assert answer == [{"text": expected}]


def test_a_head_of_its_own_is_kept_though_the_config_ties_it(
    tmp_path: Path,
) -> None:
    directory = save_t5(tmp_path / "t5")
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = torch.randn_like(tensors["shared.weight"])
    save_file(tensors, path, metadata={"format": "pt"})
    task, processor, model = open_parts("translation", PAIRS, pretrained=str(directory))
    engine = committed(task, processor, model)
    assert torch.equal(engine.model.lm_head.weight, tensors["lm_head.weight"])  # type: ignore[union-attr, arg-type]
    assert torch.equal(engine.model.shared.weight, tensors["shared.weight"])  # type: ignore[union-attr, arg-type]


def test_a_hub_id_is_opened_from_the_cache_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    root = tmp_path / "models--org--tiny"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / "main").write_text(commit)
    save_t5(root / "snapshots" / commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    _, _, model = open_parts("translation", PAIRS, pretrained="org/tiny")
    assert type(model).__name__ == "T5ForConditionalGeneration"
    with pytest.raises(ConfigError, match="'org/tiny' is no directory, and the hub gave no such checkpoint"):
        open_parts("translation", PAIRS, pretrained="org/tiny", revision="b" * 40)


def test_the_loss_of_a_pretrained_translator_is_its_own_times_the_count(tmp_path: Path) -> None:
    task, processor, model = open_parts("translation", PAIRS, pretrained=str(save_t5(tmp_path)))
    batch = task.collate([task.encode(row, processor).features for row in PAIRS], processor)
    with torch.no_grad():
        loss = task.loss(model.eval(), batch)
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "labels")}
        own = model(**inputs).loss
    assert (loss.total / loss.count).item() == pytest.approx(own.item(), rel=1e-5)


def test_a_model_whose_decoder_starts_with_the_last_token_gets_it(tmp_path: Path) -> None:
    from transformers import MBartConfig, MBartForConditionalGeneration
    from transformers.models.mbart.modeling_mbart import shift_tokens_right

    _, plain, _ = open_parts("translation", PAIRS, family="marian", tokenizer={"vocab_size": 280})
    tokenizer: Any = plain.tokenizer  # type: ignore[attr-defined]
    config = MBartConfig(
        vocab_size=280, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=32,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        forced_eos_token_id=None,
    )  # fmt: skip
    MBartForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    task, processor, _ = open_parts("translation", PAIRS, pretrained=str(tmp_path))
    batch = task.collate([task.encode(row, processor).features for row in PAIRS], processor)
    shifted = shift_tokens_right(batch["labels"].clone(), tokenizer.pad_token_id)
    counted = batch["labels"] != -100
    assert torch.equal(batch["decoder_input_ids"][counted], shifted[counted])


def test_a_pretrained_classifier_keeps_its_head_where_its_labels_cover_the_data(tmp_path: Path) -> None:
    directory = save_distilbert(tmp_path, ["zh", "fr", "en", "de", "it"])
    _, processor, model = open_parts("text-classification", TEXTS, pretrained=str(directory))
    from transformers import AutoModelForSequenceClassification

    assert processor.labels == ("zh", "fr", "en", "de", "it")
    theirs = AutoModelForSequenceClassification.from_pretrained(directory)
    assert torch.equal(model.classifier.weight, theirs.classifier.weight)


def test_a_new_head_depends_on_the_seed_and_its_name_alone(tmp_path: Path) -> None:
    directory = save_distilbert(tmp_path, ["good", "bad"])
    task, processor, model = open_parts("text-classification", TEXTS, pretrained=str(directory))
    torch.manual_seed(99)
    _, _, again = open_parts("text-classification", TEXTS, pretrained=str(directory))
    from transformers import AutoModelForSequenceClassification

    theirs = AutoModelForSequenceClassification.from_pretrained(directory)
    assert processor.labels == ("de", "en", "fr", "zh")
    assert model.classifier.weight.shape == (4, 16)
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert torch.equal(model.pre_classifier.weight, theirs.pre_classifier.weight)
    assert model.config.id2label == dict(enumerate(processor.labels))
    answers = committed(task, processor, model).answer([{"text": "one hour"}])
    assert set(answers[0]["scores"]) == set(processor.labels)  # type: ignore[index]


def test_a_pretrained_image_classifier_brings_its_image_processor(tmp_path: Path) -> None:
    directory = save_vit(tmp_path)
    task, processor, model = open_parts("image-classification", IMAGES, pretrained=str(directory))
    rows = [task.encode(row, processor).features for row in IMAGES]
    assert task.collate(rows, processor)["pixel_values"].shape == (3, 1, 8, 8)
    answers = committed(task, processor, model).answer(IMAGES)
    assert [answer["label"] in {"0", "1", "2"} for answer in answers] == [True] * 3  # type: ignore[index]


def test_a_checkpoint_with_pickled_weights_is_refused_unopened(tmp_path: Path) -> None:
    save_t5(tmp_path, safe=False)
    with pytest.raises(
        ConfigError, match=r"only weights in safetensors are opened; its weights are pytorch_model\.bin"
    ):
        open_parts("translation", PAIRS, pretrained=str(tmp_path))


def test_a_checkpoint_that_asks_for_its_own_code_is_refused(tmp_path: Path) -> None:
    directory = save_t5(tmp_path)
    config = (directory / "config.json").read_text()
    (directory / "config.json").write_text(config.replace("{", '{"auto_map": {"AutoModel": "evil.Model"},', 1))
    (directory / "evil.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(ConfigError, match=r"asks for Python code of the checkpoint \(auto_map\)"):
        open_parts("translation", PAIRS, pretrained=str(directory))


def test_a_checkpoint_of_another_kind_is_refused_with_both_names(tmp_path: Path) -> None:
    directory = save_distilbert(tmp_path, ["a", "b"])
    with pytest.raises(ConfigError, match="decoder_start_token_id"):
        open_parts("translation", PAIRS, pretrained=str(directory))


@pytest.mark.parametrize("name", ["/no/such/directory", "no-such/model", "https://host/model"])
def test_a_checkpoint_that_is_nowhere_is_named(name: str) -> None:
    with pytest.raises(ConfigError, match=r"model\.pretrained"):
        open_parts("translation", PAIRS, pretrained=name)


def test_keys_of_a_pretrained_model_may_be_changed_and_are_checked(tmp_path: Path) -> None:
    directory = str(save_t5(tmp_path))
    _, _, model = open_parts("translation", PAIRS, pretrained=directory, config={"dropout_rate": 0.25})
    assert model.config.dropout_rate == 0.25
    with pytest.raises(ConfigError, match="'dropout_rat' is no key of T5Config"):
        open_parts("translation", PAIRS, pretrained=directory, config={"dropout_rat": 0.25})


def test_frozen_parameters_get_no_gradient_and_a_pattern_without_effect_is_an_error(tmp_path: Path) -> None:
    directory = str(save_t5(tmp_path))
    _, _, model = open_parts("translation", PAIRS, pretrained=directory, freeze=["encoder.*", "shared.weight"])
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {n for n, _ in model.named_parameters() if n.startswith("encoder.")} | {"shared.weight"}
    with pytest.raises(ConfigError, match=r"model.freeze: 'encodr\.\*' matches none of the"):
        open_parts("translation", PAIRS, pretrained=directory, freeze=["encodr.*"])
    with pytest.raises(ConfigError, match="leaves no parameter to train"):
        open_parts("translation", PAIRS, pretrained=directory, freeze=["*"])


FACTORY = """
import torch
from torch import nn

class Bag(nn.Module):
    def __init__(self, width, num_labels, vocab_size):
        super().__init__()
        self.embed = nn.EmbeddingBag(vocab_size, width)
        self.out = nn.Linear(width, num_labels)

    def forward(self, input_ids, attention_mask):
        from types import SimpleNamespace
        weights = attention_mask.to(torch.float32)
        embedded = (self.embed.weight[input_ids] * weights[..., None]).sum(1)
        return SimpleNamespace(logits=self.out(embedded))

def build(width, processor):
    return Bag(width, len(processor.labels), len(processor.tokenizer))

def deferred(width, processor):
    with torch.device("meta"):
        return build(width, processor)

def nothing():
    return None
"""


@pytest.fixture
def own_factory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"own_factory_{tmp_path.name.replace('-', '_')}"
    (tmp_path / f"{name}.py").write_text(FACTORY)
    monkeypatch.syspath_prepend(tmp_path)
    return name


@pytest.mark.parametrize("function", ["build", "deferred"])
def test_a_factory_gets_its_arguments_and_the_processor_and_its_model_can_be_restored(
    own_factory: str, function: str
) -> None:
    model_section = {"factory": f"{own_factory}:{function}", "config": {"width": 8}}
    task, processor, model = open_parts("text-classification", TEXTS, **model_section)
    torch.manual_seed(3)
    again = build_model(task.config, processor, "cpu")
    assert torch.equal(model.out.weight, again.out.weight)  # type: ignore[union-attr, arg-type]
    engine = committed(task, processor, model)
    assert torch.equal(engine.model.out.weight, model.out.weight)  # type: ignore[union-attr, arg-type]
    assert set(engine.answer([{"text": "une heure"}])[0]["scores"]) == {"de", "en", "fr", "zh"}  # type: ignore[index]


def test_a_factory_that_cannot_be_used_says_why(own_factory: str) -> None:
    with pytest.raises(ConfigError, match=r"returned a NoneType, not a torch\.nn\.Module"):
        open_parts("text-classification", TEXTS, factory=f"{own_factory}:nothing")
    with pytest.raises(ConfigError, match=r'does not take model.config \{"depth": 8\}: .*depth'):
        open_parts("text-classification", TEXTS, factory=f"{own_factory}:build", config={"depth": 8})
    with pytest.raises(ConfigError, match="did you mean build"):
        open_parts("text-classification", TEXTS, factory=f"{own_factory}:buid")


def test_a_restored_model_needs_no_weights_to_be_complete() -> None:
    task, processor, model = open_parts(
        "text-classification", TEXTS, family="bert",
        config={"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32},
    )  # fmt: skip
    restored: Any = restore_model(task.config, model_files(model, task.config, processor))
    assert restored.bert.embeddings.position_ids[0, -1] == 511
    ours, theirs = restored.config.to_dict(), model.config.to_dict()
    assert ours.pop("dtype") == "float32" and theirs.pop("dtype") is None
    assert ours == theirs


def test_a_path_that_is_not_there_is_not_asked_of_the_hub() -> None:
    config = tiny_config(model={"pretrained": "./nowhere"})
    with pytest.raises(ConfigError, match=r"'./nowhere' is neither a directory that is there nor a hub id"):
        load_task(config).build_processor(iter(PAIRS))
