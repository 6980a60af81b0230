"""What `serve status` shows of what a server says about its models."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def pick(models: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    """Return one thing of each model that has it, by the model's name."""
    return {model["name"]: model[key] for model in models if model.get(key) is not None}


def with_replicas(refs: Sequence[str], models: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return references with the number of replicas that run behind each, where the server said it."""
    counts = {name: found["running"] for name, found in pick(models, "replicas").items()}
    names = {ref: ref.partition("@")[0] for ref in refs}
    return [f"{ref} ({counts[name]})" if name in counts else ref for ref, name in names.items()]
