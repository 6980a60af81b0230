"""Tiny models of each family, batches for them, and one process as the reference."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagleray.config.schema import AdapterConfig
from eagleray.lora import add_adapter
from eagleray.models.initialize import initialize, materialize
from eagleray.parallel import Fill
from eagleray.parallel.local import local, own_box

SEED = 7
SEQ2SEQ = ("marian", "t5")
IGNORED = -100
LAYOUTS_DOCUMENT = Path(__file__).parents[2] / "docs" / "layouts.md"


def own_module(**changes: Any) -> nn.Module:
    """Build the user's own module that the documentation shows."""
    blocks = re.findall(r"```python\n(.*?)```", LAYOUTS_DOCUMENT.read_text(), re.DOTALL)
    (code,) = [block for block in blocks if "def parallel_plan" in block]
    namespace: dict[str, Any] = {"__name__": "documented"}
    exec(code, namespace)
    built: nn.Module = namespace["Reader"](**changes)
    return built


KEYS: dict[str, dict[str, Any]] = {
    "marian": {
        "vocab_size": 36, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "max_position_embeddings": 32,
        "dropout": 0.0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "scale_embedding": True,
    },
    "t5": {
        "vocab_size": 36, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_decoder_layers": 2,
        "num_heads": 4, "relative_attention_num_buckets": 8, "relative_attention_max_distance": 6,
        "dropout_rate": 0.0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
    },
    "bert": {
        "vocab_size": 36, "hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 4,
        "intermediate_size": 24, "max_position_embeddings": 32, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "num_labels": 3,
    },
    "distilbert": {
        "vocab_size": 36, "dim": 16, "n_layers": 4, "n_heads": 4, "hidden_dim": 24, "max_position_embeddings": 32,
        "dropout": 0.0, "attention_dropout": 0.0, "seq_classif_dropout": 0.0, "num_labels": 3,
    },
    "qwen3": {
        "vocab_size": 36, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4, "max_position_embeddings": 32,
        "pad_token_id": 0, "use_cache": False, "num_labels": 3,
    },
    "vit": {
        "image_size": 8, "patch_size": 4, "num_channels": 1, "hidden_size": 16, "num_hidden_layers": 4,
        "num_attention_heads": 4, "intermediate_size": 24, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0, "num_labels": 3,
    },
}  # fmt: skip


def build(family: str, *, adapter: AdapterConfig | None = None, **changes: Any) -> nn.Module:
    """Build a model on `meta`."""
    with torch.device("meta"):
        if family == "own":
            built = own_module(**changes)
        else:
            config, model = _classes(family)
            built = model(config(**KEYS[family] | changes))
    if adapter is not None:
        add_adapter(built, adapter)
    return built


def _classes(family: str) -> tuple[Any, Any]:
    import transformers as t

    return {
        "marian": (t.MarianConfig, t.MarianMTModel),
        "t5": (t.T5Config, t.T5ForConditionalGeneration),
        "bert": (t.BertConfig, t.BertForSequenceClassification),
        "distilbert": (t.DistilBertConfig, t.DistilBertForSequenceClassification),
        "qwen3": (t.Qwen3Config, t.Qwen3ForSequenceClassification),
        "vit": (t.ViTConfig, t.ViTForImageClassification),
    }[family]


def fill_from_seed(seed: int = SEED) -> Fill:
    """Return what gives a model its initial weights."""
    return partial(_fill, seed=seed)


def _fill(model: nn.Module, seed: int) -> None:
    initialize(model, seed)
    _set_second_factors(model)


def build_whole(family: str, **changes: Any) -> nn.Module:
    """Build a model in one process, with the weights that every layout must have."""
    model = build(family, **changes)
    materialize(model, "cpu")
    _fill(model, SEED)
    return model


@torch.no_grad()
def _set_second_factors(model: nn.Module) -> None:
    """Let adapters add something from the first step on; they begin with zeros."""
    for name, weight in model.named_parameters():
        if name.endswith(".lora_B.weight"):
            rng = torch.Generator().manual_seed(sum(name.encode()))
            local(weight).copy_((0.2 * torch.randn(weight.shape, generator=rng))[own_box(weight)])


def global_batch(family: str, step: int, rows: int = 8) -> dict[str, Tensor]:
    """Make rows of mixed length."""
    rng = torch.Generator().manual_seed(1000 + step)
    if family == "vit":
        return {
            "pixel_values": torch.randn(rows, 1, 8, 8, generator=rng),
            "labels": torch.randint(0, 3, (rows,), generator=rng),
        }
    source, source_mask = _tokens(rng, rows, 7, 1 if family in SEQ2SEQ else 0)
    if family not in SEQ2SEQ:
        return {
            "input_ids": source,
            "attention_mask": source_mask,
            "labels": torch.randint(0, 3, (rows,), generator=rng),
        }
    target, target_mask = _tokens(rng, rows, 5, 1)
    shifted = torch.cat([torch.ones(rows, 1, dtype=torch.long), target[:, :-1]], 1)
    return {
        "input_ids": source,
        "attention_mask": source_mask,
        "decoder_input_ids": shifted,
        "labels": target.masked_fill(target_mask == 0, IGNORED),
    }


def _tokens(rng: torch.Generator, rows: int, longest: int, pad: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 36, (rows, longest), generator=rng)
    lengths = torch.randint(2, longest + 1, (rows,), generator=rng)
    lengths[0] = longest
    mask = (torch.arange(longest)[None] < lengths[:, None]).long()
    return ids.masked_fill(mask == 0, pad), mask


@dataclass(frozen=True)
class Items:
    """Summed loss and number of items."""

    total: Tensor
    count: Tensor


class TinyTask:
    """The loss of a batch, as a task computes it: the model is called once, with keywords."""

    def loss(self, model: nn.Module, batch: dict[str, Tensor]) -> Items:
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        if "decoder_input_ids" in inputs:
            inputs["use_cache"] = False  # type: ignore[assignment]
        logits, labels = model(**inputs).logits, batch["labels"]
        total = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="sum", ignore_index=IGNORED)
        return Items(total, (labels != IGNORED).sum())
