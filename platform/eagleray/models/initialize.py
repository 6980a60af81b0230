"""Initial weights from (seed, parameter name) alone, so that they are bit-equal in every layout.

A module's own initialiser runs, but each random fill of a parameter draws from a generator that is seeded by the
parameter's name, on the CPU. So neither the order of building, nor the device, nor whether the model was built on
`meta` shows in the result.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from eagleray.errors import ConfigError
from eagleray.lora import LowRank
from eagleray.models.whole import WholeParameters
from eagleray.parallel.local import materialize, skeleton_of

__all__ = ["initialize", "materialize", "skeleton_of"]

_RANDOM_FILLS = {
    torch.ops.aten.normal_,
    torch.ops.aten.uniform_,
    torch.ops.aten.bernoulli_,
    torch.ops.aten.random_,
    torch.ops.aten.exponential_,
    torch.ops.aten.log_normal_,
    torch.ops.aten.cauchy_,
    torch.ops.aten.geometric_,
}


def initialize(
    model: nn.Module, seed: int | None, *, only: set[str] | None = None, modules: set[str] | None = None
) -> None:
    """Set every parameter, and every buffer that an initialiser knows, in place.

    Modules of Hugging Face models are set by their `_init_weights`, all others by `reset_parameters`; children
    come before their parents, as in both libraries. Of a parameter that is cut over ranks each sets its part;
    then this is called by all of them together.

    Args:
        model: A model, or a stage of one, whose tensors are on a real device; see `materialize`.
        seed: Seed of the weights; None leaves random fills out, for weights that are loaded afterwards. Buffers
            that no checkpoint holds are set all the same.
        only: Names of the parameters to set; default: all.
        modules: Names of the modules to set; default: all.

    Raises:
        ConfigError: A module has parameters of its own and no way to set them.
    """
    parameters = {parameter: name for name, parameter in model.named_parameters()}
    names = {_storage(tensor): name for tensor, name in parameters.items() if _is_plain(tensor)}
    kept = [tensor for tensor, name in parameters.items() if only is not None and name not in only]
    temporary: list[int] = []

    def named(whole: Tensor, parameter: nn.Parameter) -> None:
        temporary.append(_storage(whole))
        names[temporary[-1]] = parameters[parameter]

    whole = WholeParameters(named)
    initialisers = list(_initialisers(model))
    with torch.no_grad(), torch.random.fork_rng(devices=[]), _marked_as_loaded(kept), whole.shown(model):
        for module_name, module, init in initialisers:
            if modules is not None and module_name not in modules:
                continue
            # For what is drawn into a temporary tensor first (orthogonal_, or copying torch.randn).
            torch.manual_seed(_seed_of(seed or 0, module_name))
            with _FillByName(names, seed):
                init(module)
            whole.store()
            while temporary:  # the memory may come back under another name
                names.pop(temporary.pop(), None)


class _FillByName(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Makes each random fill of a parameter depend on (seed, name) alone."""

    def __init__(self, names: Mapping[int, str], seed: int | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names = names
        self._seed = seed

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func.overloadpacket not in _RANDOM_FILLS:
            return func(*args, **kwargs)
        target: Tensor = args[0]
        name = self._names.get(_storage(target))
        if name is None or kwargs.get("generator") is not None:
            return func(*args, **kwargs)
        if self._seed is None:
            return target
        is_plain_memory = target.device.type == "cpu" and target.is_contiguous()
        drawn = target if is_plain_memory else torch.empty(target.shape, dtype=target.dtype, device="cpu")
        generator = torch.Generator().manual_seed(_seed_of(self._seed, name))
        func(drawn, *args[1:], **{**kwargs, "generator": generator})
        return target if is_plain_memory else target.copy_(drawn)


def _initialisers(model: nn.Module) -> Iterator[tuple[str, nn.Module, Callable[[nn.Module], Any]]]:
    """Yield each module that can be set, children first, with its name and what sets it."""

    def walk(module: nn.Module, prefix: str, owner: Any) -> Iterator[tuple[str, nn.Module, Any]]:
        # A Hugging Face model inside another one initialises its own modules.
        owner = module if hasattr(module, "_init_weights") else owner
        for name, child in module.named_children():
            yield from walk(child, f"{prefix}{name}.", owner)
        if init := _initialiser(module, owner, prefix.removesuffix(".")):
            yield prefix.removesuffix("."), module, init

    yield from walk(model, "", None)


def _initialiser(module: nn.Module, owner: Any, name: str) -> Callable[[nn.Module], Any] | None:
    if owner is not None and not isinstance(module, LowRank):
        return owner._init_weights  # type: ignore[no-any-return]
    for method in ("reset_parameters", "_reset_parameters"):
        if hasattr(module, method):
            return lambda module: getattr(module, method)()
    own = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    if own:
        raise ConfigError(
            f"cannot initialise {name or 'the model'} ({type(module).__name__}): it has the parameters "
            f"{', '.join(own)} and no reset_parameters()",
            "give the module a method reset_parameters() that sets them",
        )
    return None


@contextmanager
def _marked_as_loaded(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Mark tensors so that transformers' own initialisers leave them alone."""
    for tensor in tensors:
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for tensor in tensors:
            del tensor._is_hf_initialized  # type: ignore[attr-defined]


def _is_plain(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, nn.Parameter) and not tensor.is_meta and tensor.numel() > 0


def _storage(tensor: Tensor) -> int:
    """Return what is equal for all views of one piece of memory, and only for them."""
    return tensor.untyped_storage().data_ptr()


def _seed_of(seed: int, name: str) -> int:
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return int.from_bytes(digest[:8], "little", signed=True)
