"""Plans from Hugging Face's own: models whose config carries a `base_model_tp_plan`."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import nn

from eagleray.parallel.plan import ParallelPlan, TensorStyle

_STYLES: Mapping[str, TensorStyle] = {
    "colwise": "colwise",
    "colwise_gather_output": "colwise_gather",
    "rowwise": "rowwise",
    "embedding_rowwise": "vocab",
    "replicated_with_grad_allreduce": "partial",
}
"""What the styles of transformers are called here."""

_NUMBERS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def hf_plan(model: nn.Module) -> ParallelPlan:
    """Return the plan that a model's config carries: its layers for FSDP, its styles for tensor parallelism.

    A config without a plan, or with styles that are unknown here (experts, fused projections), gives none, with
    the reason.
    """
    config: Any = getattr(model, "config", None)
    theirs: Mapping[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    prefix = getattr(model, "base_model_prefix", "")
    at = f"{prefix}." if prefix and hasattr(model, prefix) else ""
    styles = {f"{at}{pattern}": style for pattern, style in theirs.items()}
    layers = {pattern.partition(".*.")[0]: None for pattern in styles if ".*." in pattern}
    lists = tuple(name for name in layers if isinstance(_find(model, name), nn.ModuleList))
    if unknown := sorted(set(styles.values()) - _STYLES.keys()):
        reason = f"the base_model_tp_plan of {type(config).__name__} has styles that are not supported: "
        return ParallelPlan(layers=lists, no_tensor=reason + ", ".join(unknown))
    found = {pattern: _STYLES[style] for pattern, style in styles.items() if _can_be_cut(model, pattern)}
    numbers = {key: getattr(config, key) for key in _NUMBERS if isinstance(getattr(config, key, None), int)}
    return ParallelPlan(layers=lists, tensor=found, divisible=numbers if found else {})


def _can_be_cut(model: nn.Module, pattern: str) -> bool:
    """Say whether a pattern matches modules, and none whose weight belongs to another module as well."""
    modules = [module for name, module in model.named_modules() if fnmatch.fnmatchcase(name, pattern)]
    holders = Counter(p for module in model.modules() for p in module.parameters(recurse=False))
    return bool(modules) and all(holders[p] == 1 for module in modules for p in module.parameters(recurse=False))


def _find(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None
