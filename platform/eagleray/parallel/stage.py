"""One stage of a pipeline: the part of a model that a rank holds, and how it is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from eagleray.parallel.collectives import contiguous_gradient
from eagleray.parallel.plan import ParallelPlan
from eagleray.parallel.remnants import Absent, Remnant

Inputs = Mapping[str, Any]
"""The keywords that the task's loss calls the model with."""


class SummedLoss(Protocol):
    """A loss as a sum over items, and their number."""

    @property
    def total(self) -> Tensor:
        """Sum over the items, differentiable, shape ()."""
        ...

    @property
    def count(self) -> Tensor:
        """Number of items, shape ()."""
        ...


class LossFunction(Protocol):
    """What a task does with a model and a batch; the model is called once, with keywords."""

    def __call__(self, model: nn.Module, batch: dict[str, Tensor]) -> SummedLoss:
        """Return the loss of a batch."""
        ...


class Stage(nn.Module):
    """Some consecutive layers of a model, with the embeddings before and the head behind them that are its own.

    What travels from stage to stage is the residual stream, and behind an encoder also its result. Everything
    else (token ids, masks, labels) each stage takes from the batch, which the ranks of a pipeline all read.

    Args:
        model: The model; what this stage does not run is taken out of it.
        plan: Its layers.
        layers: Indices of this stage's layers in the order of all layers.
        loss: The task's loss.
    """

    def __init__(self, model: nn.Module, plan: ParallelPlan, layers: range, loss: LossFunction) -> None:
        super().__init__()
        assert plan.pipeline is not None
        sizes = [len(plan.layer_list(model, name)) for name in plan.layers]
        self.layers = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == sum(sizes)
        self._places = [(part, number) for part, size in enumerate(sizes) for number in range(size)]
        prune(model, plan, layers)
        self.module = model
        self._parts = plan.pipeline(model)
        self._lists = [plan.layer_list(model, name) for name in plan.layers]
        self._loss = loss
        self.counts: list[Tensor] = []

    @property
    def has_memory(self) -> bool:
        """Whether the stage passes an encoder's result on, besides the stream."""
        return self._places[self.layers.stop - 1][0] > 0

    def opens_part(self, part: int) -> bool:
        """Whether the first layer of one of the model's lists of layers is here."""
        return any(self._places[index] == (part, 0) for index in self.layers)

    def forward(self, *received: Tensor, **batch: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return what the next stage needs, or in the last stage the summed loss, shape (1,)."""
        stream = tuple(contiguous_gradient(value) for value in received)
        if self.is_last:
            loss = self._loss(_LastPart(self, stream), batch)
            self.counts.append(loss.count.detach())
            return torch.stack([loss.total])  # a view may lose the hook that FSDP puts on it
        found = self.run(stream, capture_inputs(self._loss, batch, self.training))
        # Where nothing is trained so far no gradient is asked for, but the schedule sends one to every stage.
        # It travels in float32, as the receiving buffers are made; autocast leaves another type.
        hidden, *memory = (
            value.float() if value.requires_grad else value.detach().float().requires_grad_() for value in found
        )
        # gloo refuses what is not contiguous. What is passed on is copied, since the schedules that split the
        # backward pass cannot treat an input, or a view, as an output.
        return (hidden.contiguous(), *(value.clone(memory_format=torch.contiguous_format) for value in memory))

    def run(self, stream: Sequence[Tensor], inputs: Inputs) -> tuple[Tensor, ...]:
        """Run this stage's layers on the stream and return it, with the encoder's result where there is one."""
        hidden, memory = (None, None) if self.is_first else (stream[0], stream[1] if len(stream) > 1 else None)
        previous = self._places[self.layers.start - 1][0] if self.layers.start else -1
        arguments: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        for index in self.layers:
            part, number = self._places[index]
            if part != previous:
                memory = None if hidden is None else self._parts.memory(hidden)
                previous, arguments = part, None
                hidden = self._parts.embed(part, inputs)
            assert hidden is not None
            if arguments is None:
                arguments = self._parts.arguments(part, hidden, memory, inputs)
            output = self._lists[part][str(number)](hidden, *arguments[0], **arguments[1])
            hidden = output[0] if isinstance(output, tuple) else output
        assert hidden is not None
        return (hidden,) if memory is None else (hidden, memory)

    def finish(self, stream: Sequence[Tensor], inputs: Inputs) -> Any:
        """Run the layers and the head."""
        return self._parts.head(self.run(stream, inputs)[0], inputs)


class _LastPart(nn.Module):
    """Stands for the whole model in the task's loss: goes on from the stream that came from the stage before."""

    def __init__(self, stage: Stage, stream: Sequence[Tensor]) -> None:
        super().__init__()
        self.training = stage.training
        # Not a submodule: its parameters are the stage's.
        self._finish: Callable[[Inputs], Any] = partial(stage.finish, stream)

    def forward(self, **inputs: Any) -> Any:
        """Return what the whole model would."""
        return self._finish(inputs)


class _CalledError(Exception):
    """The task called the model; ends the loss of a stage that has no output to compute it from."""


class _Probe(nn.Module):
    inputs: dict[str, Any] | None = None

    def forward(self, **inputs: Any) -> Any:
        self.inputs = inputs
        raise _CalledError


def capture_inputs(loss: LossFunction, batch: dict[str, Tensor], training: bool = True) -> dict[str, Any]:
    """Return the keywords that a loss calls the model with."""
    probe = _Probe()
    probe.training = training
    try:
        loss(probe, batch)
    except _CalledError:
        assert probe.inputs is not None
        return probe.inputs
    raise TypeError("the task's loss did not call the model; a pipeline needs one call with keywords")


def prune(model: nn.Module, plan: ParallelPlan, layers: range) -> None:
    """Take out of a model what a stage does not run; what is left keeps its names."""
    assert plan.pipeline is not None
    parts = plan.pipeline(model)
    kept, start = set[str](), 0
    for list_name, embeds in zip(plan.layers, parts.embed_modules, strict=True):
        size = len(plan.layer_list(model, list_name))
        if start in layers:
            kept |= set(embeds)
        numbers = {str(index - start) for index in layers if start <= index < start + size}
        kept |= _keep_layers(model, plan, list_name, numbers)
        start += size
    if layers.stop == start:
        kept |= set(parts.head_modules)
    _drop_others(model, plan, kept)


def _keep_layers(model: nn.Module, plan: ParallelPlan, list_name: str, numbers: set[str]) -> set[str]:
    """Take the other layers out of a list; return names of modules in them that the layers that stay read."""
    own = plan.layer_list(model, list_name)
    read = {name for name in plan.read_by_layers if numbers and name.startswith(f"{list_name}.")}
    stack: dict[str, nn.Module] = {}
    for number, layer in own.items():
        if number in numbers:
            stack[number] = layer
        elif any(name.startswith(f"{list_name}.{number}.") for name in read):
            stack[number] = Remnant(layer)
    _set_module(model, list_name, nn.ModuleDict(stack))
    return read


def _drop_others(model: nn.Module, plan: ParallelPlan, kept: set[str]) -> None:
    """Replace modules with parameters that are neither in a layer nor kept, unless a kept one shares them."""
    needed = {p for name in kept for p in model.get_submodule(name).parameters()}
    layers = [name for name, _ in plan.named_layers(model)]
    for name, module in list(model.named_modules()):
        if module not in set(model.modules()):
            continue  # inside of one that is out already
        own = set(module.parameters(recurse=False))
        stays = any(name == keep or name.startswith(f"{keep}.") for keep in [*layers, *kept])
        if own and name and not stays and not own <= needed:
            _set_module(model, name, Absent(module))


def _set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, key = name.rpartition(".")
    setattr(model.get_submodule(parent), key, module)
