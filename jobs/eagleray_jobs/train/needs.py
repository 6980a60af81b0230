"""What the workers of a run will hold at least, and which keys of the file make it less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, check_layout, check_supported
from eagleray.parallel.footprint import Footprint, estimate_footprints, state_tensors
from eagleray_jobs.train.memory import show_bytes

_AXES = {
    "shard": ("parallel.data_parallel_shard_degree", "shards weights, gradients and optimizer state (FSDP)"),
    "tensor": ("parallel.tensor_parallel_degree", "cuts each layer"),
    "pipeline": ("parallel.pipeline_parallel_degree", "gives each worker some of the layers"),
}
_REPLICATE = "parallel.data_parallel_replicate_degree"


@dataclass(frozen=True, slots=True)
class Remedy:
    """A setting that makes workers hold less.

    Attributes:
        settings: Keys and values, as they are typed behind a file.
        effect: What they do.
        num_bytes: What the fullest worker would then hold, of weights, gradients and optimizer state.
        refusal: Why this model cannot be cut so.
    """

    settings: str
    effect: str
    num_bytes: int | None = None
    refusal: str | None = None

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.settings}: not possible, {self.refusal}"
        need = "" if self.num_bytes is None else f"about {show_bytes(self.num_bytes)} per worker; "
        return f"{self.settings}: {need}{self.effect}"


@dataclass(frozen=True, slots=True)
class Needs:
    """What the fullest worker holds from step to step, and what would make it less.

    Attributes:
        layout: The degrees.
        footprint: Of the fullest worker.
        remedies: The four of them, in the order in which they are worth trying.
    """

    layout: Layout
    footprint: Footprint
    remedies: tuple[Remedy, ...]

    def summary(self) -> str:
        """Say it in a line."""
        parts = self.footprint
        return (
            f"about {show_bytes(parts.total)} per worker ({self.layout}): weights {show_bytes(parts.parameters)}, "
            f"gradients {show_bytes(parts.gradients)}, optimizer {show_bytes(parts.optimizer)}; activations and "
            "Python come on top"
        )

    def warning(self, limit_bytes: float | None, key: str) -> str | None:
        """Say that a limit is below what is needed; None: it is not, or there is none."""
        if limit_bytes is None or self.footprint.total < limit_bytes:
            return None
        return (
            f"{key} is {limit_bytes:.0f} ({show_bytes(limit_bytes)}), and weights, gradients and optimizer state "
            f"alone are about {show_bytes(self.footprint.total)} per worker"
        )

    def hint(self) -> str:
        """Name what the workers need and the remedies with their keys."""
        lines = [f"weights, gradients and optimizer state are {self.summary()}", "what makes it less:"]
        return "\n  ".join([*lines, *(f"  {remedy}" for remedy in self.remedies)])


def find_needs(model: nn.Module, config: RunConfig, layout: Layout) -> Needs:
    """Estimate what workers hold, in this layout and in those that cut more.

    Args:
        model: The whole model; `meta` will do.
        config: The file, with its `train` section.
        layout: Its degrees.

    Raises:
        ConfigError: The model cannot be cut by this layout.
    """
    assert config.train is not None
    plan, options = parallel_plan(model), ParallelOptions.of(config)
    num_states = state_tensors(config.train)

    def fullest(candidate: Layout) -> Footprint:
        check_layout(model, candidate, plan, options)
        found = estimate_footprints(model, candidate, plan, options, num_states)
        return max(found, key=lambda each: each.total)

    remedies = []
    for settings, effect, candidate in _cut_more(layout):
        try:
            check_supported(candidate, options, config.train.global_batch_size)
            remedies.append(Remedy(settings, effect, fullest(candidate).total))
        except ConfigError as error:
            remedies.append(Remedy(settings, effect, refusal=error.message))
    return Needs(layout, fullest(layout), (*remedies, _smaller_activations(config)))


def _cut_more(layout: Layout) -> Iterator[tuple[str, str, Layout]]:
    """Yield the layouts that put replicas to better use, or without replicas double one degree."""
    factor, rest = (layout.replicate, replace(layout, replicate=1)) if layout.replicate > 1 else (2, layout)
    for axis, (key, effect) in _AXES.items():
        degree = getattr(rest, axis) * factor
        settings = f"{key}={degree}"
        if layout.replicate > 1:
            settings = f"{_REPLICATE}=1 {settings}"
        yield settings, effect, replace(rest, **{axis: degree})


def _smaller_activations(config: RunConfig) -> Remedy:
    assert config.train is not None
    rows = config.train.per_device_train_batch_size
    now = f"now {rows}" if rows is not None else "now not limited"
    fewer = f"a smaller train.per_device_train_batch_size ({now})"
    if config.parallel.activation_checkpointing == "full":
        return Remedy(fewer, "fewer activations at a time")
    return Remedy(
        f"parallel.activation_checkpointing=full or {fewer}",
        "less memory for activations; weights, gradients and optimizer state stay",
    )
