"""Initialisers of whole tensors, run on a model whose parameters are cut over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eagleray.parallel.local import local, own_box, whole_tensor

Parameters = dict[str, nn.Parameter | None]


class WholeParameters:
    """Shows the parameters that are cut over ranks whole, as long as an initialiser works on them.

    What sets a parameter (a fill, a row of padding, a table of positions) is written for the whole of it. So a
    parameter becomes a temporary whole one when it is first looked at, and `store` keeps this rank's part of it:
    one module after the other, a rank holds no more than what that module sets. A parameter that is looked at
    again, since a parent changes what its child has set, is gathered; the ranks that hold its parts run the same
    initialisers in the same order.

    Args:
        named: Called with each temporary tensor and the parameter that it stands for.
    """

    def __init__(self, named: Callable[[Tensor, nn.Parameter], None]) -> None:
        self._named = named
        self._whole: dict[nn.Parameter, nn.Parameter] = {}
        self._stored: set[nn.Parameter] = set()

    @contextmanager
    def shown(self, model: nn.Module) -> Iterator[None]:
        """Show whole parameters in a model."""
        cut = [(module, module._parameters) for module in model.modules() if _is_cut(module._parameters)]
        for module, parameters in cut:
            module.__dict__["_parameters"] = _Shown(parameters, self)
        try:
            yield
        finally:
            for module, parameters in cut:
                module.__dict__["_parameters"] = parameters

    def store(self) -> None:
        """Copy this rank's part of what was looked at to where it belongs, and let the whole tensors go."""
        for parameter, whole in self._whole.items():
            if not whole.is_meta:
                local(parameter).copy_(whole[own_box(parameter)])
                self._stored.add(parameter)
        self._whole.clear()

    def of(self, parameter: nn.Parameter) -> nn.Parameter:
        """Return the whole tensor that stands for a parameter."""
        if parameter not in self._whole:
            self._whole[parameter] = self._make(parameter)
        return self._whole[parameter]

    def replace(self, parameter: nn.Parameter, whole: nn.Parameter) -> None:
        """Take another whole tensor for a parameter: an initialiser made one instead of filling this."""
        self._whole[parameter] = whole

    def _make(self, parameter: nn.Parameter) -> nn.Parameter:
        is_kept = getattr(parameter, "_is_hf_initialized", False)
        if parameter in self._stored:
            data = whole_tensor(parameter)
        else:  # what is not to be set needs no memory
            device = "meta" if is_kept else local(parameter).device
            data = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        whole = nn.Parameter(data, requires_grad=parameter.requires_grad)
        if is_kept:
            whole._is_hf_initialized = True  # type: ignore[attr-defined]
        else:
            self._named(whole, parameter)
        return whole


class _Shown(dict[str, Any]):
    """A module's own parameters, whole as soon as they are looked at."""

    def __init__(self, parameters: Parameters, whole: WholeParameters) -> None:
        super().__init__(parameters)
        self._whole = whole

    def __getitem__(self, name: str) -> Any:
        parameter = super().__getitem__(name)
        return parameter if parameter is None or not _is_part(parameter) else self._whole.of(parameter)

    def __setitem__(self, name: str, value: Any) -> None:
        parameter = dict.get(self, name)
        if parameter is not None and _is_part(parameter):
            assert isinstance(value, nn.Parameter)
            self._whole.replace(parameter, value)
        else:
            super().__setitem__(name, value)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self else default

    def items(self) -> Any:
        return [(name, self[name]) for name in self]

    def values(self) -> Any:
        return [self[name] for name in self]


def _is_cut(parameters: Parameters) -> bool:
    return any(parameter is not None and _is_part(parameter) for parameter in parameters.values())


def _is_part(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)
