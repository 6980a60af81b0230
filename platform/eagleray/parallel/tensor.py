"""Tensor parallelism: weights are DTensors cut by the plan, every rank computes with its local part.

The collectives stand at the borders of each cut block and carry their own derivatives (`collectives`), so that
dropout, attention kernels and masks inside of it see plain tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn import functional as F
from torch.nn.utils.stateless import _reparametrize_module

from eagleray.errors import ConfigError
from eagleray.lora import LoraLinear, LowRank
from eagleray.parallel import collectives
from eagleray.parallel.plan import ParallelPlan, TensorStyle
from eagleray.parallel.remnants import Absent

_CUT_DIM: Mapping[TensorStyle, int] = {
    "colwise": 0,
    "colwise_gather": 0,
    "vocab": 0,
    "vocab_head": 0,
    "rowwise": 1,
}


class TensorParallel:
    """Cuts the modules of one model over one group.

    Args:
        plan: Style of each module.
        mesh: The mesh's axis `tp`.
        sequence_parallel: Whether the residual stream of the layers is cut along the sequence.
    """

    def __init__(self, plan: ParallelPlan, mesh: DeviceMesh, *, sequence_parallel: bool = False) -> None:
        self._plan = plan
        self._mesh = mesh
        self._group = mesh.get_group()
        self._sequence_parallel = sequence_parallel
        self._distributed: dict[nn.Parameter, nn.Parameter] = {}
        self._streams = {name: _Length() for name in plan.layers}

    def cut(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Cut modules by the style of their names; parameters that are shared stay shared."""
        for name, module in modules:
            style = self._plan.style(name)
            if style is not None and not isinstance(module, Absent | LowRank):
                self._apply(style, name, module)
            for attribute in self._plan.divided_by(name):
                setattr(module, attribute, getattr(module, attribute) // self._group.size())

    def cut_sequence(self, model: nn.Module) -> None:
        """Cut the residual stream before the first layer of each list and put it together after the last."""
        for name, length in self._streams.items() if self._sequence_parallel else ():
            stack = list(self._plan.layer_list(model, name).values())
            if stack:
                stack[0].register_forward_pre_hook(partial(self._split_stream, length), with_kwargs=True)
                stack[-1].register_forward_hook(partial(self._gather_stream, length))

    def _apply(self, style: TensorStyle, name: str, module: nn.Module) -> None:
        if style == "region":
            enter = partial(self._enter_region, self._length_of(name))
            module.register_forward_pre_hook(enter, with_kwargs=True)
        elif style in ("norm", "partial"):
            if style == "partial" or self._sequence_parallel:
                _replace_forward(module, partial(_forward_partial, module, module.forward, self._group))
        elif style in ("vocab", "vocab_head"):
            self._apply_vocab(style, name, module)
        elif isinstance(module, nn.Embedding) and style == "colwise":
            self._distribute(module, 1, name)
            _replace_forward(module, partial(_forward_columns, module))
        elif isinstance(module, nn.Linear):
            self._distribute_linear(module, style, name)
            _replace_forward(module, partial(self._linear_forward(style, name), module))
        else:
            raise ConfigError(f"the parallel plan gives {name} the style {style}, but it is no nn.Linear")

    def _apply_vocab(self, style: TensorStyle, name: str, module: nn.Module) -> None:
        if not isinstance(module, nn.Embedding if style == "vocab" else nn.Linear):
            raise ConfigError(
                f"the parallel plan gives {name} the style {style}, but it is {type(module).__name__}"
            )
        if module.weight.shape[0] % self._group.size():
            return
        if isinstance(module, nn.Embedding):
            self._distribute(module, 0, name)
            _replace_forward(module, partial(_forward_embedding, module, self._group))
        else:
            self._distribute_linear(module, style, name)
            _replace_forward(module, partial(self._colwise_gather, module))

    def _linear_forward(self, style: TensorStyle, name: str) -> Callable[..., Tensor]:
        if style == "rowwise":
            return self._rowwise
        if style == "colwise_gather":
            return self._colwise_gather
        if self._in_region(name):
            return _forward_local
        return partial(self._colwise, self._length_of(name))

    def _length_of(self, name: str) -> _Length | None:
        """Return where the length of the residual stream stands that a module lies on."""
        return next((length for layers, length in self._streams.items() if name.startswith(f"{layers}.")), None)

    def _in_region(self, name: str) -> bool:
        parents = name.split(".")[:-1]
        return any(self._plan.style(".".join(parents[:depth])) == "region" for depth in range(1, len(parents) + 1))

    def _distribute_linear(self, module: nn.Linear, style: TensorStyle, name: str) -> None:
        """Cut a Linear; of an adapter the matrix on the side of the cut is cut, and the other one is whole."""
        self._distribute(module, _CUT_DIM[style], name)
        if isinstance(module, LoraLinear):
            cut, whole = module.lora_B, module.lora_A
            if style == "rowwise":
                cut, whole = whole, cut
            self._distribute(cut, _CUT_DIM[style], name)
            _replace_forward(cut, partial(_forward_local, cut))
            _replace_forward(whole, partial(_forward_partial, whole, whole.forward, self._group))

    def _distribute(self, module: nn.Module, dim: int, name: str) -> None:
        for key, parameter in list(module.named_parameters(recurse=False)):
            if parameter.ndim > dim:
                if parameter.shape[dim] % self._group.size():
                    raise ConfigError(
                        f"parallel.tensor_parallel_degree {self._group.size()} does not divide "
                        f"{parameter.shape[dim]}, dim {dim} of {name}.{key}"
                    )
                module.register_parameter(key, self._distribute_parameter(parameter, dim))

    def _distribute_parameter(self, parameter: nn.Parameter, dim: int) -> nn.Parameter:
        if parameter not in self._distributed:
            # No source rank: every rank has the same values, and cuts its part without communication.
            cut: Tensor = distribute_tensor(parameter.detach(), self._mesh, [Shard(dim)], src_data_rank=None)
            if not cut.is_meta:
                cut = cut.clone()  # a view would keep the memory of the whole
            self._distributed[parameter] = nn.Parameter(cut, requires_grad=parameter.requires_grad)
        return self._distributed[parameter]

    def _colwise(self, length: _Length | None, module: nn.Linear, x: Tensor) -> Tensor:
        return _forward_local(module, self._enter(length, x))

    def _colwise_gather(self, module: nn.Linear, x: Tensor) -> Tensor:
        y = _forward_local(module, collectives.sum_gradient(x, self._group))
        return collectives.gather(y, -1, module.weight.shape[0], self._group, partial_gradient=False)

    def _rowwise(self, module: nn.Linear, x: Tensor) -> Tensor:
        part, bias = _product(module, x), module.bias
        if not self._sequence_parallel:
            y = collectives.sum_over(part, self._group)
            return y if bias is None else y + bias
        y = collectives.reduce_scatter(part, 1, self._group)
        return y if bias is None else y + collectives.sum_gradient(bias, self._group)

    def _enter(self, length: _Length | None, x: Tensor) -> Tensor:
        """Take the residual stream into a block whose ranks compute different parts."""
        if self._sequence_parallel and length is not None:
            return collectives.gather(x, 1, length.value, self._group, partial_gradient=True)
        return collectives.sum_gradient(x, self._group)

    def _enter_region(
        self, length: _Length | None, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        values = [*args, *kwargs.values()]
        stream = next(index for index, value in enumerate(values) if _is_activation(value))
        entered = [
            self._enter(length, value) if index == stream else self._share(value)
            for index, value in enumerate(values)
        ]
        return tuple(entered[: len(args)]), dict(zip(kwargs, entered[len(args) :], strict=True))

    def _share(self, value: Any) -> Any:
        needs_sum = _is_activation(value) and value.requires_grad
        return collectives.sum_gradient(value, self._group) if needs_sum else value

    def _split_stream(
        self, length: _Length, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if args:
            return (self._split(length, args[0]), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": self._split(length, kwargs["hidden_states"])}

    def _split(self, length: _Length, stream: Tensor) -> Tensor:
        length.value = stream.shape[1]
        return collectives.split(stream, 1, self._group)

    def _gather_stream(self, length: _Length, layer: nn.Module, args: Any, output: Any) -> Any:
        stream = output[0] if isinstance(output, tuple) else output
        whole = collectives.gather(stream, 1, length.value, self._group, partial_gradient=False)
        return (whole, *output[1:]) if isinstance(output, tuple) else whole


def divided_parameters(model: nn.Module, plan: ParallelPlan, degree: int) -> dict[nn.Parameter, int]:
    """Return the parameters that a tensor-parallel degree would cut, each with the dim; nothing is changed."""
    found: dict[nn.Parameter, int] = {}
    for name, module in model.named_modules() if degree > 1 else ():
        style = plan.style(name)
        if style is None or style not in _CUT_DIM or isinstance(module, Absent | LowRank):
            continue
        if style in ("vocab", "vocab_head") and next(module.parameters()).shape[0] % degree:
            continue
        by_columns = isinstance(module, nn.Embedding) and style == "colwise"
        dim, parts = 1 if by_columns else _CUT_DIM[style], [module]
        if isinstance(module, LoraLinear):
            parts.append(module.lora_A if style == "rowwise" else module.lora_B)
        own = [parameter for part in parts for parameter in part.parameters(recurse=False)]
        found |= {parameter: dim for parameter in own if parameter.ndim > dim}
    return found


class _Length:
    """Length of a sequence that is cut at the moment: parts do not know it, and it need not be divisible.

    Each list of layers has its own: the encoder is computed again after the decoder has run.
    """

    value = 0


def _forward_local(module: nn.Linear, x: Tensor) -> Tensor:
    return _product(module, x, None if module.bias is None else _local(module.bias))


def _product(module: nn.Linear, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = F.linear(x, _local(module.weight), bias)
    return y + module.adapt(x) if isinstance(module, LoraLinear) else y


def _forward_embedding(module: nn.Embedding, group: dist.ProcessGroup, ids: Tensor) -> Tensor:
    """Look up the rows that this rank holds; the sum over the group has all."""
    assert module.max_norm is None and not module.scale_grad_by_freq and not module.sparse
    weight = _local(module.weight)
    own = ids - dist.get_rank(group) * weight.shape[0]
    elsewhere = (own < 0) | (own >= weight.shape[0])
    rows = F.embedding(own.masked_fill(elsewhere, 0), weight)
    if module.padding_idx is not None:  # its row gets no gradient from here
        rows = rows.detach().where((ids == module.padding_idx).unsqueeze(-1), rows)
    return collectives.sum_over(rows.masked_fill(elsewhere.unsqueeze(-1), 0), group)


def _forward_columns(module: nn.Embedding, ids: Tensor) -> Tensor:
    return F.embedding(ids, _local(module.weight), module.padding_idx)


def _forward_partial(
    module: nn.Module, forward: Callable[..., Any], group: dist.ProcessGroup, *args: Any, **kwargs: Any
) -> Any:
    """Run a module whose weights are whole on a part of its input: the gradients of its weights are summed."""
    summed = {name: collectives.sum_gradient(value, group) for name, value in module.named_parameters()}
    with _reparametrize_module(module, summed):
        return forward(*args, **kwargs)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    # Hooks, names and state_dict stay those of the module: a wrapper module would change the names.
    module.forward = forward


def _local(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor), "the plan cuts this parameter"
    return parameter.to_local()


def _is_activation(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.ndim == 3
