"""The output projection runs where there is a label, and nothing else changes."""

from __future__ import annotations

import copy

import pytest
import tiny_models
import torch
from tiny_models import PAIRS, tiny_config, tiny_parts
from torch import Tensor, nn

from eagleray.projection import choose_before_projecting, projecting_only
from eagleray.tasks.rows import IGNORED

MODELS = {
    "marian": tiny_models.MODELS["translation"],
    "t5": {
        "family": "t5",
        "config": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "dropout_rate": 0.0},
        "tokenizer": {"vocab_size": 280},
    },
}


def seen_rows(model: nn.Module) -> list[int]:
    """Record how many positions the output projection computes."""
    counts: list[int] = []

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(output.numel() // output.shape[-1])

    model.get_output_embeddings().register_forward_hook(record)  # type: ignore[operator]
    return counts


@pytest.mark.parametrize("family", MODELS)
def test_loss_and_gradients_are_those_of_all_positions(family: str) -> None:
    task, processor, everywhere = tiny_parts(tiny_config(model=MODELS[family]))
    batch = task.collate([task.encode(example, processor).features for example in PAIRS], processor)
    chosen = copy.deepcopy(everywhere)
    choose_before_projecting(chosen)
    losses, counts = [], []
    for model in (everywhere, chosen):
        counts.append(seen_rows(model))
        loss = task.loss(model, dict(batch))
        torch.autograd.backward(loss.total)
        losses.append(loss)
    num_labels = int((batch["labels"] != IGNORED).sum())
    assert counts == [[batch["labels"].numel()], [num_labels]] and num_labels < batch["labels"].numel()
    assert losses[0].count == losses[1].count == num_labels
    torch.testing.assert_close(losses[1].total, losses[0].total, rtol=1e-6, atol=0)
    for (name, parameter), other in zip(everywhere.named_parameters(), chosen.parameters(), strict=True):
        torch.testing.assert_close(other.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_a_model_is_whole_outside_of_a_loss() -> None:
    model = nn.Linear(4, 8)
    model.get_output_embeddings = lambda: model
    choose_before_projecting(model)
    hidden = torch.randn(2, 3, 4)
    with pytest.raises(RuntimeError, match="from within"), projecting_only(torch.arange(6) % 5 == 0):
        assert model(hidden).shape == (2, 8)
        raise RuntimeError("from within")
    assert model(hidden).shape == (2, 3, 8)


def test_a_model_without_output_embeddings_is_left_alone() -> None:
    model = nn.Linear(4, 8)
    choose_before_projecting(model)
    with projecting_only(torch.arange(6) == 0):
        assert model(torch.randn(2, 3, 4)).shape == (2, 3, 8)
