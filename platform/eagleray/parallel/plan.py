"""What a model tells about itself so that a layout can cut it: its layers and the style of each module."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from torch import Tensor, nn

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel.remnants import Remnant

TensorStyle = Literal["colwise", "colwise_gather", "rowwise", "region", "vocab", "vocab_head", "norm", "partial"]
"""How tensor parallelism treats a module (Shoeybi et al. 2019, Megatron-LM, arXiv 1909.08053).

- `colwise`: a Linear, or an Embedding, cut by its output features; its output stays cut.
- `colwise_gather`: the same, and the output is put together again.
- `rowwise`: a Linear cut by its input features; outputs are summed over the group.
- `region`: a module whose Linears are `colwise` and share one input (attention): the input's gradient is summed
  once for all of them.
- `vocab`: an Embedding cut by its rows; `vocab_head`: a Linear whose weight may be tied to it, output put
  together. Both stay whole where the degree does not divide the vocabulary.
- `norm`: a module with whole weights on the residual stream; with `sequence_parallel` each rank applies it to a
  part of the sequence, so its gradients are summed (Korthikanti et al. 2022, arXiv 2205.05198).
- `partial`: a module with whole weights inside of a region: each rank applies it to its own heads, so its
  gradients are summed.
"""


class PipelineParts(Protocol):
    """What a model does before, between and behind its layers, so that stages can run it. To be subclassed."""

    @property
    def embed_modules(self) -> tuple[tuple[str, ...], ...]:
        """For each list of layers, names of the modules that `embed` uses."""
        ...

    @property
    def head_modules(self) -> tuple[str, ...]:
        """Names of the modules that `head` uses."""
        ...

    def embed(self, part: int, inputs: Mapping[str, Any]) -> Tensor:
        """Return what the first layer of a list gets; `part` is the list's number."""
        ...

    def arguments(
        self, part: int, hidden: Tensor, memory: Tensor | None, inputs: Mapping[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Return what every layer of a list gets behind the stream: masks, the encoder's result (`memory`)."""
        ...

    def memory(self, hidden: Tensor) -> Tensor:
        """Return what a decoder reads of the encoder's last layer; called where the decoder's first layer is."""
        return hidden

    def head(self, hidden: Tensor, inputs: Mapping[str, Any]) -> Any:
        """Turn the last layer's result into what the whole model returns."""
        ...


@dataclass(frozen=True, slots=True)
class ParallelPlan:
    """How a model can be cut.

    Attributes:
        layers: Names of the `nn.ModuleList`s whose items are the layers, in the order in which they run. Each
            layer is one unit of FSDP and of activation checkpointing, and pipelines are cut between layers.
        tensor: Style of each module under tensor parallelism, by shell pattern of its name; the first match
            counts.
        divisible: Numbers that the tensor-parallel degree must divide, by their names.
        divided: Attribute of modules that tensor parallelism divides by its degree, a number of heads, by shell
            pattern of their names; where a module computes with the heads of its weights alone, none is needed.
        read_by_layers: Names of modules in a layer that the other layers of its list read, too (relative position
            biases): every stage that runs some of these layers holds them.
        sequence: Whether the residual stream of the layers may be cut along the sequence, dim 1 of each layer's
            first argument and of its result.
        pipeline: What stands around the layers, made from the model; None: it cannot be cut into stages.
        no_tensor: Why tensor parallelism is not possible, where it is not.
    """

    layers: tuple[str, ...] = ()
    tensor: Mapping[str, TensorStyle] = field(default_factory=dict)
    divisible: Mapping[str, int] = field(default_factory=dict)
    divided: Mapping[str, str] = field(default_factory=dict)
    read_by_layers: tuple[str, ...] = ()
    sequence: bool = False
    pipeline: Callable[[nn.Module], PipelineParts] | None = None
    no_tensor: str | None = None

    def style(self, name: str) -> TensorStyle | None:
        """Return the style of a module by its name, None if tensor parallelism leaves it alone."""
        return next((style for pattern, style in self.tensor.items() if fnmatch.fnmatchcase(name, pattern)), None)

    def divided_by(self, name: str) -> list[str]:
        """Return the attributes of a module that tensor parallelism divides."""
        return [attribute for pattern, attribute in self.divided.items() if fnmatch.fnmatchcase(name, pattern)]

    def named_layers(self, model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """Yield the layers that a model holds, with their names, in the order in which they run.

        Raises:
            ConfigError: A name in `layers` is no list of modules.
        """
        for list_name in self.layers:
            yield from (
                (f"{list_name}.{name}", layer) for name, layer in self.layer_list(model, list_name).items()
            )

    @staticmethod
    def layer_list(model: nn.Module, name: str) -> dict[str, nn.Module]:
        """Return one list of layers, by number; a pipeline stage runs some of the numbers."""
        try:
            found = model.get_submodule(name)
        except AttributeError:
            found = None
        if not isinstance(found, nn.ModuleList | nn.ModuleDict | nn.Sequential):
            raise ConfigError(
                f"the plan names the layers {name!r}: {type(model).__name__} has no list of modules there",
                "give the name of an nn.ModuleList",
            )
        return {name: layer for name, layer in found.named_children() if not isinstance(layer, Remnant)}


def check_tensor_plan(plan: ParallelPlan, layout: Layout, *, sequence_parallel: bool = False) -> None:
    """Refuse a tensor-parallel degree that the model does not allow.

    Raises:
        ConfigError: There is no plan, or the degree does not divide a number that it must; with the numbers.
    """
    degree = layout.tensor
    if sequence_parallel and degree == 1:
        raise ConfigError("parallel.sequence_parallel needs parallel.tensor_parallel_degree above 1")
    if degree == 1:
        return
    if not plan.tensor:
        reason = plan.no_tensor or "the model has no tensor-parallel plan"
        raise ConfigError(
            f"parallel.tensor_parallel_degree is {degree}, but {reason}",
            "set it to 1, or give the module a parallel_plan; data_parallel_shard_degree cuts any model",
        )
    odd = {name: number for name, number in plan.divisible.items() if number % degree}
    if odd:
        shown = " and ".join(f"{name} {number}" for name, number in odd.items())
        raise ConfigError(
            f"parallel.tensor_parallel_degree {degree} does not divide {shown}",
            f"degrees that fit: {_fitting(plan)}",
        )
    if sequence_parallel and not plan.sequence:
        raise ConfigError("parallel.sequence_parallel: the model's plan does not allow it", "leave it out")


def check_styles(model: nn.Module, plan: ParallelPlan) -> None:
    """Refuse a plan whose patterns match nothing or name a wrong style: a misspelt one would be ignored.

    Raises:
        ConfigError: Such a pattern.
    """
    names = [name for name, _ in model.named_modules()]
    for pattern, style in plan.tensor.items():
        if style not in get_args(TensorStyle):
            raise ConfigError(
                f"the parallel plan gives {pattern!r} the style {style!r}",
                f"styles are {', '.join(get_args(TensorStyle))}",
            )
        if not any(re.match(fnmatch.translate(pattern), name) for name in names):
            raise ConfigError(
                f"the parallel plan's pattern {pattern!r} matches no module of {type(model).__name__}",
                f"modules are named like {', '.join(names[1:4])}",
            )


def _fitting(plan: ParallelPlan) -> str:
    smallest = min(plan.divisible.values())
    return ", ".join(
        str(degree)
        for degree in range(1, smallest + 1)
        if all(number % degree == 0 for number in plan.divisible.values())
    )
