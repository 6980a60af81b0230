"""Tiny files, rows and Hugging Face checkpoints for the tests of tasks, models and the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from eagleray.config.schema import RunConfig
from eagleray.models import build_model
from eagleray.tasks import Example, Processor, Task, load_task

PAIRS: list[Example] = [
    {"source": "January 5", "target": "5 janvier", "kind": "date"},
    {"source": "one hour", "target": "une heure", "kind": "unit"},
    {"source": "two hours and 30 minutes", "target": "deux heures et 30 minutes", "kind": "unit"},
    {"source": "France", "target": "France"},
    {"source": "What is it?", "target": "Qu'est-ce que c'est\u202f?"},
]
TEXTS: list[Example] = [
    {"text": "one hour", "label": "en", "kind": "unit"},
    {"text": "une heure", "label": "fr", "kind": "unit"},
    {"text": "eine Stunde", "label": "de"},
    {"text": "\u4e00\u5c0f\u65f6", "label": "zh"},
    {"text": "dix heures", "label": "fr"},
]
IMAGES: list[Example] = [
    {"image": [[row * 20 + 10 * column for column in range(8)] for row in range(8)], "label": 0},
    {"image": [[255 - 30 * row for _ in range(8)] for row in range(8)], "label": 1},
    {"image": [[(row * column) % 256 for column in range(8)] for row in range(8)], "label": 2},
]
ROWS = {"translation": PAIRS, "text-classification": TEXTS, "image-classification": IMAGES}
MODELS: dict[str, dict[str, Any]] = {
    "translation": {
        "family": "marian",
        "config": {
            "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
            "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "dropout": 0.0,
            "max_position_embeddings": 32,
        },
        "tokenizer": {"vocab_size": 280},
    },
    "text-classification": {
        "family": "bert",
        "config": {
            "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32,
            "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 32,
        },
        "tokenizer": {"vocab_size": 280},
    },
    "image-classification": {
        "family": "vit",
        "config": {
            "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32,
        },
    },
}  # fmt: skip


def tiny_config(task: str = "translation", **changes: Any) -> RunConfig:
    """Return a small file; `changes` replace its sections."""
    sections: dict[str, Any] = {
        "name": "tiny",
        "task": task,
        "model": MODELS.get(task),
        "data": {"train": "rows.jsonl", "max_source_length": 32, "max_target_length": 24},
        "train": {"max_steps": 1},
        **changes,
    }
    return RunConfig.model_validate(sections)


def tiny_parts(config: RunConfig) -> tuple[Task, Processor, torch.nn.Module]:
    """Return the task of a file, its processor from the tiny rows, and the model."""
    task = load_task(config)
    processor = task.build_processor(iter(ROWS[config.task]))
    return task, processor, build_model(config, processor, "cpu")


def save_t5(directory: Path, *, safe: bool = True) -> Path:
    """Write a tiny T5 checkpoint with a tokenizer, as a pretrained one."""
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = load_task(tiny_config()).build_processor(iter(PAIRS)).tokenizer  # type: ignore[attr-defined]
    config = T5Config(
        vocab_size=len(tokenizer), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
        task_specific_params={"translation_en_to_fr": {"prefix": "translate: "}},
    )  # fmt: skip
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(config).eval()
    tokenizer.save_pretrained(directory)
    if safe:
        model.save_pretrained(directory)
    else:
        config.save_pretrained(directory)
        torch.save(model.state_dict(), directory / "pytorch_model.bin")
    return directory


def save_distilbert(directory: Path, labels: list[str]) -> Path:
    """Write a tiny DistilBERT classifier with a tokenizer, as a pretrained one."""
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    processor: Any = load_task(tiny_config("text-classification")).build_processor(iter(TEXTS))
    config = DistilBertConfig(
        vocab_size=len(processor.tokenizer), dim=16, hidden_dim=32, n_layers=1, n_heads=2,
        max_position_embeddings=32, pad_token_id=processor.pad_token_id, id2label=dict(enumerate(labels)),
        label2id={label: number for number, label in enumerate(labels)},
    )  # fmt: skip
    torch.manual_seed(0)
    DistilBertForSequenceClassification(config).eval().save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)
    return directory


def save_vit(directory: Path) -> Path:
    """Write a tiny ViT classifier of three classes with its image processor, as a pretrained one."""
    _, processor, model = tiny_parts(tiny_config("image-classification"))
    hf_model: Any = model
    hf_model.save_pretrained(directory)
    for name, data in processor.files().items():
        (directory / name).write_bytes(data)
    return directory
