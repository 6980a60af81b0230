"""A family through the whole loop, from scratch and pretrained: the layout does not show in the result."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from training import Job, make_config, processor_of, train

from eagleray.config.schema import RunConfig
from eagleray.models import build_model

Groups = Callable[[int], RankGroup]

TASKS = {"t5": "translation", "distilbert": "text-classification"}
CONFIGS: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    "distilbert": {
        "dim": 16, "n_layers": 2, "n_heads": 4, "hidden_dim": 32, "dropout": 0.0, "attention_dropout": 0.0,
        "seq_classif_dropout": 0.0, "max_position_embeddings": 128,
    },
}  # fmt: skip
LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"data_parallel_shard_degree": 2},
    "tp2": {"tensor_parallel_degree": 2, "sequence_parallel": True},
    "pp2": {"pipeline_parallel_degree": 2},
    "pp2.tp2": {"pipeline_parallel_degree": 2, "tensor_parallel_degree": 2},
    "fsdp2.tp2": {"data_parallel_shard_degree": 2, "tensor_parallel_degree": 2},
}
CASES = list(product(TASKS, LAYOUTS, ("scratch", "pretrained")))
SAMPLE = {("t5", "pp2", "pretrained"), ("t5", "tp2", "scratch"), ("distilbert", "fsdp2", "pretrained")}


def file_of(family: str, layout: int | dict[str, Any], directory: Path | None, **train: Any) -> RunConfig:
    """Return a file that trains a family, from a directory where one is given."""
    config = make_config(TASKS[family], layout=layout, **train)
    model = {"family": family, "config": CONFIGS[family], "tokenizer": {"vocab_size": 300}}
    return RunConfig.model_validate(
        config.model_dump() | {"model": {"pretrained": str(directory)} if directory else model}
    )


def save_pretrained(family: str, directory: Path) -> None:
    """Write a checkpoint whose weights are not those of the seed that is trained with."""
    config = file_of(family, 1, None, seed=3)
    processor: Any = processor_of(config.task)
    model: Any = build_model(config, processor, "cpu")
    model.save_pretrained(directory)
    processor.tokenizer.save_pretrained(directory)


@pytest.mark.parametrize(
    "family, layout, origin",
    [pytest.param(*case, marks=() if case in SAMPLE else pytest.mark.slow) for case in CASES],
)
def test_a_layout_changes_neither_losses_nor_weights_nor_answers(
    group: Groups, tmp_path: Path, family: str, layout: str, origin: str
) -> None:
    directory = None
    if origin == "pretrained":
        directory = tmp_path / "pretrained"
        save_pretrained(family, directory)
    keys = {"max_steps": 3, "save_steps": 3, "eval_steps": 3, "metric_for_best_model": "loss"}
    alone = Job(file_of(family, 1, directory, **keys), str(tmp_path / "one"), num_validation=5)
    one = group(1).run(train, alone)[0]
    config = file_of(family, LAYOUTS[layout], directory, **keys)
    workers = 4 if "." in layout else 2
    cut = group(workers).run(train, Job(config, str(tmp_path / "cut"), num_validation=5))[0]
    assert cut.losses == pytest.approx(one.losses, abs=1e-6)
    assert cut.records[2].scores == pytest.approx(one.records[2].scores, abs=1e-6)
    assert cut.tensors.keys() == one.tensors.keys()
    torch.testing.assert_close(cut.tensors, one.tensors, rtol=0, atol=2e-5)
