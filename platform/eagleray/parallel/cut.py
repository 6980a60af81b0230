"""Where a pipeline is cut: consecutive layers for each stage, the dearest stage as cheap as possible."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from torch import nn

from eagleray.errors import ConfigError
from eagleray.parallel.plan import ParallelPlan


def cut_layers(costs: Sequence[float], num_stages: int, split: Sequence[int] | None = None) -> list[range]:
    """Give each stage its layers.

    Args:
        costs: Estimated cost of each layer, in the order in which they run.
        num_stages: Stages of the pipeline; each gets at least one layer.
        split: The file's number of layers of each stage, instead of balanced costs.

    Returns:
        Indices of the layers of each stage.

    Raises:
        ConfigError: There are fewer layers than stages, or `split` does not fit them.
    """
    if len(costs) < num_stages:
        raise ConfigError(
            f"the model has {len(costs)} layers, too few for {num_stages} pipeline stages",
            "each stage needs a layer: lower parallel.pipeline_parallel_degree, or take a schedule with one stage "
            "per rank (1F1B, GPipe)",
        )
    if split is None:
        return balance(costs, num_stages)
    if len(split) != num_stages or sum(split) != len(costs) or min(split) < 1:
        raise ConfigError(
            f"parallel.pipeline_parallel_split is {list(split)}",
            f"give {num_stages} numbers of at least 1, one for each stage, whose sum is the {len(costs)} layers",
        )
    ends = list(accumulate(split))
    return [range(end - size, end) for end, size in zip(ends, split, strict=True)]


def balance(costs: Sequence[float], num_stages: int) -> list[range]:
    """Cut a sequence into consecutive, non-empty parts whose largest sum is least; the last parts are the fullest.

    Dynamic programming over (parts, end), O(parts * length ** 2).
    """
    sums = [0.0, *accumulate(costs)]
    length = len(costs)
    best = {(0, 0): (0.0, 0)}
    for part in range(1, num_stages + 1):
        for end in range(part, length - (num_stages - part) + 1):
            best[part, end] = min(
                (max(best[part - 1, start][0], sums[end] - sums[start]), start)
                for start in range(part - 1, end)
                if (part - 1, start) in best
            )
    parts, end = [], length
    for part in range(num_stages, 0, -1):
        start = best[part, end][1]
        parts.append(range(start, end))
        end = start
    return parts[::-1]


def estimate_costs(model: nn.Module, plan: ParallelPlan, length: int) -> list[float]:
    """Return multiplications per token of each layer; embeddings count to the first layer that they feed.

    Args:
        model: The whole model; `meta` will do.
        plan: Its layers, and what stands before and behind them.
        length: Tokens of a sequence: what attention costs grows with it.
    """
    layers = dict(plan.named_layers(model))
    costs = {name: _matrices(layer) + _attention(plan, name, layer, length) for name, layer in layers.items()}
    if plan.pipeline is not None:
        parts = plan.pipeline(model)
        for list_name, modules in zip(plan.layers, parts.embed_modules, strict=True):
            first = next(iter(plan.layer_list(model, list_name)))
            costs[f"{list_name}.{first}"] += sum(_rows(model.get_submodule(name)) for name in modules)
        costs[next(reversed(costs))] += sum(_matrices(model.get_submodule(name)) for name in parts.head_modules)
    return list(costs.values())


def describe_cut(model: nn.Module, plan: ParallelPlan, cut: Sequence[range], length: int) -> list[str]:
    """Say in a line for each stage which layers it has and what they cost.

    Args:
        model: The whole model; `meta` will do.
        plan: Its layers.
        cut: The layers of each stage.
        length: Tokens of a sequence.
    """
    names = [name for name, _ in plan.named_layers(model)]
    costs = estimate_costs(model, plan, length)
    lines = []
    for number, layers in enumerate(cut):
        share = sum(costs[layer] for layer in layers) / sum(costs)
        lines.append(
            f"stage {number}: {_spans([names[layer] for layer in layers])}; {share:.0%} of the estimated cost"
        )
    return lines


def _spans(names: Sequence[str]) -> str:
    """Shorten consecutive layers of one list: `encoder.layers.0 to 5`."""
    spans: dict[str, list[str]] = {}
    for name in names:
        list_name, _, number = name.rpartition(".")
        spans.setdefault(list_name, []).append(number)
    shown = (f"{list_name}.{' to '.join(dict.fromkeys((each[0], each[-1])))}" for list_name, each in spans.items())
    return ", ".join(shown)


def _matrices(module: nn.Module) -> float:
    return float(sum(p.numel() for m in module.modules() for p in m.parameters(recurse=False) if p.ndim >= 2))


def _rows(module: nn.Module) -> float:
    """A look-up touches one row for each token, however many there are."""
    return float(sum(parameter.shape[-1] for parameter in module.parameters() if parameter.ndim >= 2))


def _attention(plan: ParallelPlan, name: str, layer: nn.Module, length: int) -> float:
    widths = [
        max(p.shape[0] for p in module.parameters() if p.ndim >= 2)
        for inner, module in layer.named_modules()
        if inner and plan.style(f"{name}.{inner}") == "region"
    ]
    return float(sum(2 * length * width for width in widths))
