"""The user's own module of the documentation for `model.factory`, right or wrong on demand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch.distributed as dist
from families import own_module
from torch import nn
from torch.nn import functional as F

from eagleray.parallel import ParallelPlan

Wrong = Literal["plan", "random", "raises"]


def build(
    processor: Any, width: int = 16, inner: int = 24, depth: int = 4, wrong: Wrong | None = None
) -> nn.Module:
    """Build the module from `model.config`; its vocabulary and classes are the data's."""
    sizes = {"vocab_size": len(processor.tokenizer), "num_labels": len(processor.labels)}
    model: Any = own_module(width=width, inner=inner, depth=depth, **sizes)
    if wrong == "plan":
        plan = model.parallel_plan()
        model.parallel_plan = lambda: without_norms(plan)
    elif wrong == "random":
        model.register_forward_hook(draw)
    elif wrong == "raises":
        model.register_forward_pre_hook(fail)
    assert isinstance(model, nn.Module)
    return model


def without_norms(plan: ParallelPlan) -> ParallelPlan:
    """With `sequence_parallel` the norms' gradients stay those of a part of the sequence."""
    return replace(plan, tensor={name: style for name, style in plan.tensor.items() if style != "norm"})


def draw(model: nn.Module, args: Any, output: Any) -> Any:
    output.logits = F.dropout(output.logits, 0.1)
    return output


def fail(model: nn.Module, args: Any) -> None:
    if dist.get_world_size() == 2 and dist.get_rank() == 1:
        raise ValueError("the second rank has had enough")
