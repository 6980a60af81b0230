"""Which layouts are tried, and the file as it is verified in one of them."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from typing import Any

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError

SINGLE = Layout()


def layouts_up_to(max_workers: int) -> list[Layout]:
    """Return every way to cut the work over 2 to `max_workers` workers: the simple ones of a number first."""
    degrees = range(1, max_workers + 1)
    found = [
        layout
        for replicate, shard, tensor, pipeline in product(degrees, repeat=4)
        if 1 < (layout := Layout(replicate, shard, tensor, pipeline)).num_workers <= max_workers
    ]
    return sorted(found, key=_order)


def _order(layout: Layout) -> tuple[int, int, tuple[int, ...]]:
    degrees = (layout.replicate, layout.shard, layout.tensor, layout.pipeline)
    return layout.num_workers, sum(degree > 1 for degree in degrees), tuple(-degree for degree in degrees)


def config_for_check(config: RunConfig, num_steps: int) -> tuple[RunConfig, tuple[str, ...]]:
    """Return a file as it is verified, and what it says otherwise: precision, compilation, where it starts.

    Raises:
        ConfigError: The file does not train.
    """
    train = config.train
    if train is None:
        raise ConfigError(f"{config.name}: there is no `train` section", "add one with max_steps")
    wanted: dict[str, Any] = {"bf16": False, "fp16": False, "torch_compile": False, "init_from": None}
    changed = {key: value for key, value in wanted.items() if getattr(train, key) != value}
    notes = tuple(
        f"train.{key} {getattr(train, key)} is not used: the check computes in float32, from new weights"
        for key in changed
    )
    for_steps: dict[str, Any] = {"stop_at_step": num_steps, "logging_steps": 1}
    never = dict.fromkeys(("eval_steps", "save_steps", "early_stopping_patience", "save_total_limit"))
    update = changed | for_steps | never | {"report_to": []}
    return config.model_copy(update={"train": train.model_copy(update=update)}), notes


def config_in(config: RunConfig, layout: Layout, options: Mapping[str, Any] | None = None) -> RunConfig:
    """Return a file with another layout; what belongs to degrees that the layout lacks is left out.

    The split of a pipeline belongs to its degree, and `sequence_parallel` to tensor parallelism.

    Args:
        config: The file.
        layout: The degrees.
        options: Further keys of `parallel`, in the place of the file's.
    """
    parallel = config.parallel.model_copy(update=options)
    update: Mapping[str, Any] = {
        "data_parallel_replicate_degree": layout.replicate,
        "data_parallel_shard_degree": layout.shard,
        "tensor_parallel_degree": layout.tensor,
        "pipeline_parallel_degree": layout.pipeline,
        "cpu_offload": False,  # where weights wait changes no value
        "sequence_parallel": parallel.sequence_parallel and layout.tensor > 1,
        "pipeline_parallel_split": (
            parallel.pipeline_parallel_split if layout.pipeline == parallel.pipeline_parallel_degree else None
        ),
    }
    return config.model_copy(update={"parallel": parallel.model_copy(update=update)})
