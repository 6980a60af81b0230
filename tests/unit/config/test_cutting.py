"""A model that a layout cannot cut is refused when the file is read, with the numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eagleray.config.crosschecks import cross_problems
from eagleray.config.cutting import SIZES
from eagleray.config.families import FAMILIES
from eagleray.config.schema import RunConfig


def messages(model: dict[str, Any], **parallel: Any) -> list[str]:
    task = "translation" if model.get("family") in ("marian", "t5") else "text-classification"
    data = {"train": "rows.jsonl"}
    sections = {"name": "x", "task": task, "model": model, "data": data, "parallel": parallel}
    return [problem.message for problem in cross_problems(RunConfig.model_validate(sections))]


def test_the_sizes_are_keys_of_every_family() -> None:
    assert SIZES.keys() == FAMILIES.keys()
    for family, sizes in SIZES.items():
        assert {*sizes.heads, *sizes.layers} <= FAMILIES[family].model_fields.keys()


@pytest.mark.parametrize(
    "model, parallel, message",
    [
        (
            {"family": "t5", "config": {"num_heads": 6, "d_ff": 32}},
            {"tensor_parallel_degree": 4},
            "parallel.tensor_parallel_degree 4 does not divide num_heads 6 of the t5 model",
        ),
        (
            {"family": "bert"},
            {"tensor_parallel_degree": 3},
            "3 does not divide num_attention_heads 4 and intermediate_size 512 of the bert model",
        ),
        (
            {"family": "t5", "config": {"num_layers": 1}},
            {"pipeline_parallel_degree": 3},
            "3 with 1 stages per rank (1F1B) makes 3 stages, but the model has 2 layers",
        ),
        (
            {"family": "distilbert"},
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
            "makes 4 stages, but the model has 2 layers",
        ),
        (
            {"family": "t5"},
            {"pipeline_parallel_degree": 2, "pipeline_parallel_schedule": "ZBVZeroBubble"},
            "ZBVZeroBubble cannot run a t5 model: gradients are lost of an encoder's result that several layers",
        ),
        (
            {"factory": "module:build"},
            {
                "pipeline_parallel_degree": 2,
                "data_parallel_shard_degree": 2,
                "pipeline_parallel_schedule": "InterleavedZeroBubble",
            },
            "InterleavedZeroBubble does not work beside data-parallel degrees: FSDP loses gradients",
        ),
        (
            {"family": "t5", "config": {"num_layers": 2}},
            {"pipeline_parallel_degree": 2, "pipeline_parallel_split": [3, 2]},
            "is [3, 2]; give 2 numbers, one for each stage, whose sum is the 4 layers",
        ),
    ],
)
def test_a_family_that_the_layout_cannot_cut_is_refused(
    model: dict[str, Any], parallel: dict[str, Any], message: str
) -> None:
    (found,) = messages(model, **parallel)
    assert message in found


def test_a_layout_that_fits_is_no_problem() -> None:
    assert messages({"family": "t5"}, tensor_parallel_degree=4) == []
    assert messages({"family": "t5"}, pipeline_parallel_degree=6) == []
    assert messages({"family": "bert"}, data_parallel_shard_degree=3) == []


def checkpoint(directory: Path, model_type: str, **numbers: int) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, **numbers}))
    return directory


def test_a_local_checkpoint_is_looked_into(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "distilbert", n_heads=12, hidden_dim=3072)
    (found,) = messages({"pretrained": str(path)}, tensor_parallel_degree=5)
    assert "5 does not divide n_heads 12 and hidden_dim 3072 of the distilbert model" in found
    assert messages({"pretrained": str(path)}, tensor_parallel_degree=4) == []


def test_a_hub_id_is_looked_up_in_the_cache_and_fetched_by_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert messages({"pretrained": "org/model"}, tensor_parallel_degree=5) == []
    cached = tmp_path / "models--org--model"
    checkpoint(cached / "snapshots" / "abc", "distilbert", n_heads=12, hidden_dim=3072)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    (found,) = messages({"pretrained": "org/model"}, tensor_parallel_degree=5)
    assert "5 does not divide n_heads 12 and hidden_dim 3072 of the distilbert model" in found
    assert messages({"pretrained": "no hub id"}, tensor_parallel_degree=5) == []


def test_a_checkpoint_of_no_family_is_cut_by_its_heads_and_into_no_stages(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "qwen3", num_attention_heads=16, num_key_value_heads=8, intermediate_size=3072)
    assert messages({"pretrained": str(path)}, tensor_parallel_degree=8) == []
    (found,) = messages({"pretrained": str(path)}, tensor_parallel_degree=16)
    assert "16 does not divide num_key_value_heads 8 of the qwen3 model" in found
    (found,) = messages({"pretrained": str(path)}, pipeline_parallel_degree=2)
    assert "stages are made of marian, t5, bert, distilbert, vit, not of qwen3" in found


def test_a_global_batch_that_makes_no_equal_micro_batches_is_refused_with_the_numbers() -> None:
    sections = {
        "name": "x",
        "task": "translation",
        "model": {"family": "marian"},
        "data": {"train": "rows.jsonl"},
        "train": {"max_steps": 1, "global_batch_size": 60},
        "parallel": {"pipeline_parallel_degree": 2, "data_parallel_replicate_degree": 2},
    }
    (found,) = cross_problems(RunConfig.model_validate(sections))
    assert found.message.startswith("train.global_batch_size 60 over 2 data-parallel ranks does not make 4 equal")
    assert "use a multiple of 8" in found.message
    assert cross_problems(RunConfig.model_validate(sections | {"train": {"max_steps": 1}})) == []


@pytest.mark.parametrize(
    "serve, message",
    [
        ({"tensor_parallel_degree": 3}, "serve.tensor_parallel_degree 3 does not divide num_attention_heads 4"),
        (
            {"pipeline_parallel_degree": 5},
            "serve.pipeline_parallel_degree 5 makes as many stages, but",
        ),
        ({"tensor_parallel_degree": 2, "engine": "ctranslate2"}, "serve.engine ctranslate2 runs in one process"),
    ],
)
def test_a_replica_that_cannot_be_cut_is_refused(serve: dict[str, Any], message: str) -> None:
    sections = {"name": "x", "task": "text-classification", "model": {"family": "bert"}, "serve": serve}
    config = RunConfig.model_validate({**sections, "data": {"train": "rows.jsonl"}})
    (problem,) = cross_problems(config)
    assert message in problem.message and problem.key[0] == "serve"
