"""What can be served over several workers, and what is refused, with the numbers."""

from __future__ import annotations

from torch import nn

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.engine.decoder import UnknownModelError
from eagleray.engine.decoder.cut import SkeletonParts
from eagleray.engine.decoder.families import build_network
from eagleray.engine.decoder.rules import unfollowed_settings
from eagleray.errors import ConfigError
from eagleray.models import restore_unfilled
from eagleray.models.base import OpenedCheckpoint
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, ParallelPlan, check_layout


def group_layout(serve: ServeConfig) -> Layout:
    """Return how one replica's model is cut."""
    return Layout(tensor=serve.tensor_parallel_degree, pipeline=serve.pipeline_parallel_degree)


def check_group(checkpoint: OpenedCheckpoint, serve: ServeConfig) -> None:
    """Refuse a version that cannot be served over so many workers, before there are any.

    Raises:
        ConfigError: It cannot.
    """
    layout = group_layout(serve)
    if layout.num_workers > 1:
        config = checkpoint.config()
        model = restore_unfilled(config, checkpoint.files())
        check_model(model, parallel_plan(model), layout, serve, config)


def check_model(
    model: nn.Module, plan: ParallelPlan, layout: Layout, serve: ServeConfig, config: RunConfig
) -> None:
    """Refuse a model that cannot be cut like this, or an option that a group of ranks does not have.

    Args:
        model: The whole model; `meta` will do.
        plan: What it tells about itself.
        layout: How it is cut.
        serve: What is asked for.
        config: The file that trained it.

    Raises:
        ConfigError: It cannot; with the numbers.
    """
    adapter = config.model.adapter
    if adapter is not None and adapter.commit == "adapter":
        raise ConfigError(
            f"{config.name} holds an adapter alone, which is not served over several workers",
            "train with model.adapter.commit: merged, or export it and import the export",
        )
    if serve.engine == "ctranslate2":
        raise ConfigError(
            "serve.engine ctranslate2 runs in one process, not over several workers", "set serve.engine: torch"
        )
    try:
        check_layout(model, layout, plan, ParallelOptions(length=config.data.max_source_length))
    except ConfigError as error:
        raise ConfigError(error.message.replace("parallel.", "serve."), error.hint) from error
    if is_decoded_here(model):
        return
    if layout.pipeline > 1 and hasattr(model, "generate"):
        raise ConfigError(
            f"serve.pipeline_parallel_degree is {layout.pipeline}, but {config.name} is decoded by transformers, "
            "which needs the whole model in each process",
            "set it to 1; serve.tensor_parallel_degree may cut it",
        )
    if layout.tensor > 1 and serve.dtype != "float32":
        raise ConfigError(
            f"serve.dtype {serve.dtype} over {layout.tensor} tensor-parallel workers is for models that our own "
            f"decoder knows, and {config.name} is none",
            "set serve.dtype: float32, or serve.tensor_parallel_degree: 1",
        )


def is_decoded_here(model: nn.Module) -> bool:
    """Whether our own decoder takes a model, whole or cut; `meta` will do."""
    config = getattr(model, "generation_config", None)
    if config is None or unfollowed_settings(config.to_dict()):
        return False
    try:
        build_network(model, "float32", SkeletonParts)
    except UnknownModelError:
        return False
    return True
