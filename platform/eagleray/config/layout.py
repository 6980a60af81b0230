"""The layout of a run: how many ways the work is cut, as integers."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Literal

from eagleray.config.schema import ParallelConfig
from eagleray.errors import ConfigError

_KEYS = {
    "replicate": "data_parallel_replicate_degree",
    "shard": "data_parallel_shard_degree",
    "tensor": "tensor_parallel_degree",
    "pipeline": "pipeline_parallel_degree",
}


@dataclass(frozen=True, slots=True)
class Layout:
    """The four degrees, each at least 1; their product is the number of workers.

    Attributes:
        replicate: Replicas of the model (DDP).
        shard: Shards of parameters and optimizer state (FSDP).
        tensor: Cuts of each layer.
        pipeline: Stages of layers.
    """

    replicate: int = 1
    shard: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def num_workers(self) -> int:
        """Workers that the layout needs."""
        return self.replicate * self.shard * self.tensor * self.pipeline

    @property
    def num_data_ranks(self) -> int:
        """Slices that a global batch is cut into."""
        return self.replicate * self.shard

    def __str__(self) -> str:
        """Spell it from the outermost axis of the mesh inwards: `pp2.ddp2.tp2`, `hsdp2x2`, `single`."""
        parts = [
            f"pp{self.pipeline}" if self.pipeline > 1 else "",
            self._data_part(),
            f"tp{self.tensor}" if self.tensor > 1 else "",
        ]
        return ".".join(filter(None, parts)) or "single"

    def _data_part(self) -> str:
        if self.replicate > 1 and self.shard > 1:
            return f"hsdp{self.replicate}x{self.shard}"
        if self.shard > 1:
            return f"fsdp{self.shard}"
        return f"ddp{self.replicate}" if self.replicate > 1 else ""


_AXIS_OF = {"ddp": "replicate", "fsdp": "shard", "tp": "tensor", "pp": "pipeline"}
_PART = re.compile(r"(?P<kind>ddp|fsdp|tp|pp)(?P<degree>[1-9]\d*)|hsdp(?P<replicate>[1-9]\d*)x(?P<shard>[1-9]\d*)")


def parse_layout(text: str) -> Layout:
    """Read a layout as it is spelled: `ddp2`, `fsdp2.tp2`, `hsdp2x2`, `pp2.tp2`, `single`; in any order.

    Raises:
        ConfigError: It is not spelled like that, or names an axis twice.
    """
    degrees: dict[str, int] = {}
    for part in [] if text == "single" else text.split("."):
        match = _PART.fullmatch(part)
        found: dict[str, int] = {}
        if match is not None and match["kind"]:
            found = {_AXIS_OF[match["kind"]]: int(match["degree"])}
        elif match is not None:
            found = {"replicate": int(match["replicate"]), "shard": int(match["shard"])}
        if not found or found.keys() & degrees.keys():
            raise ConfigError(
                f"{text!r} is no layout" if not found else f"the layout {text!r} names an axis twice",
                "spell it like ddp2, fsdp2.tp2, hsdp2x2, pp2.tp2 or single",
            )
        degrees |= found
    return Layout(**degrees)


def resolve_layout(parallel: ParallelConfig, num_workers: int | None) -> Layout:
    """Turn the degrees of the file into a layout.

    Args:
        parallel: The file's degrees; at most one of them is `auto`.
        num_workers: Workers that the file asks for; None: the product of the degrees.

    Raises:
        ConfigError: The degrees do not multiply to `num_workers`, or it is not clear what `auto` stands for.
    """
    degrees: dict[str, int | Literal["auto"]] = {axis: getattr(parallel, key) for axis, key in _KEYS.items()}
    open_axes = [axis for axis, degree in degrees.items() if degree == "auto"]
    known = {axis: degree for axis, degree in degrees.items() if degree != "auto"}
    if len(open_axes) > 1:
        raise ConfigError(
            f"{_names(open_axes)} are all auto, and only one degree can be",
            hint="Give all of them but one a number.",
        )
    if open_axes:
        known[open_axes[0]] = _quotient(known, open_axes[0], num_workers)
    layout = Layout(**known)
    if num_workers is not None and layout.num_workers != num_workers:
        raise ConfigError(
            f"{_equation(known)}, but num_workers is {num_workers}",
            hint="Change the degrees under `parallel` or resources.num_workers; one degree may be auto.",
        )
    return layout


def _quotient(known: dict[str, int], axis: str, num_workers: int | None) -> int:
    if num_workers is None:
        raise ConfigError(
            f"parallel.{_KEYS[axis]} is auto, and so is resources.num_workers",
            hint="Give one of them a number.",
        )
    degree, rest = divmod(num_workers, prod(known.values()))
    if rest or not degree:
        raise ConfigError(
            f"{_equation(known)}, which does not divide num_workers {num_workers}; parallel.{_KEYS[axis]} is auto",
            hint="Change the degrees under `parallel` or resources.num_workers.",
        )
    return degree


def _equation(degrees: dict[str, int]) -> str:
    shown = {axis: degrees[axis] for axis in _KEYS if degrees.get(axis, 1) > 1} or {"replicate": 1}
    terms = " x ".join(f"{degree} ({axis})" for axis, degree in shown.items())
    return f"{terms} = {prod(degrees.values())}"


def _names(axes: Iterable[str]) -> str:
    return " and ".join(f"parallel.{_KEYS[axis]}" for axis in axes)
