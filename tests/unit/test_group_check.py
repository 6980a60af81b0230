"""What is refused before a model is loaded onto several workers."""

from __future__ import annotations

from typing import Any

import pytest
from fake_checkpoint import FakeCheckpoint, tiny_checkpoint

from eagleray.config.schema import ServeConfig
from eagleray.engine.group import check_group
from eagleray.errors import ConfigError
from eagleray_serving.autoscaling import deployment_options

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "heads": (
        "translation",
        {"tensor_parallel_degree": 4},
        "serve.tensor_parallel_degree 4 does not divide encoder_attention_heads 2",
    ),
    "layers": (
        "translation",
        {"pipeline_parallel_degree": 3},
        "the model has 2 layers, too few for 3",
    ),
    "engine": ("translation", {"tensor_parallel_degree": 2, "engine": "ctranslate2"}, "runs in one process"),
    "dtype": (
        "text-classification",
        {"tensor_parallel_degree": 2, "dtype": "bfloat16"},
        "serve.dtype bfloat16 over 2 tensor-parallel workers is for models that our own decoder knows",
    ),
}


@pytest.mark.parametrize("task, serve, message", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_cut_is_refused_with_the_numbers(task: str, serve: dict[str, Any], message: str) -> None:
    checkpoint, _ = tiny_checkpoint(task)
    with pytest.raises(ConfigError, match=message) as raised:
        check_group(checkpoint, ServeConfig(**serve))
    assert raised.value.hint


def test_what_transformers_decodes_is_cut_by_tensors_and_not_into_stages() -> None:
    checkpoint, model = tiny_checkpoint()
    settings: Any = model
    settings.generation_config.no_repeat_ngram_size = 2
    from tiny_models import tiny_parts

    from eagleray.models import model_files

    config = checkpoint.config()
    _, processor, _ = tiny_parts(config)
    changed = FakeCheckpoint(config, model_files(model, config, processor), {})
    check_group(changed, ServeConfig(tensor_parallel_degree=2))
    with pytest.raises(ConfigError, match="decoded by transformers, which needs the whole model in each process"):
        check_group(changed, ServeConfig(pipeline_parallel_degree=2))


@pytest.mark.parametrize("task", ["translation", "image-classification"])
def test_what_fits_is_accepted(task: str) -> None:
    checkpoint, _ = tiny_checkpoint(task)
    check_group(checkpoint, ServeConfig(tensor_parallel_degree=2))


def test_a_replica_of_several_workers_asks_for_their_resources_and_none_of_its_own() -> None:
    serve = ServeConfig(
        tensor_parallel_degree=2, pipeline_parallel_degree=2, ray_actor_options={"num_cpus": 0.5}, num_replicas=3
    )
    options = deployment_options(serve)
    assert options["ray_actor_options"] == {"num_cpus": 0, "num_gpus": 0}
    assert options["placement_group_bundles"] == [{"CPU": 0.5}] * 4
    assert "placement_group_bundles" not in deployment_options(ServeConfig())
