"""The documented example of a user's own task and model."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from eagleray.config.loader import LoadedFile, load_files
from eagleray.errors import DataError
from eagleray.models import build_model, load_weights, model_files, restore_model
from eagleray.tasks import load_task
from eagleray.user_code import add_code

FILE = Path(__file__).parents[2] / "docs" / "own-model" / "length-guess.yaml"
ROWS = [{"source": "x" * n, "target": "y" * (2 * n)} for n in range(1, 33)]


@pytest.fixture
def loaded() -> Iterator[LoadedFile]:
    before, modules = list(sys.path), set(sys.modules)
    (found,) = load_files([FILE], environ={})
    add_code(found.config.code)
    yield found
    sys.path[:] = before
    for name in set(sys.modules) - modules:
        if name.startswith("length_guess"):
            del sys.modules[name]


def test_the_example_learns_and_comes_back_from_its_files(loaded: LoadedFile) -> None:
    config = loaded.config
    task = load_task(config)
    processor = task.build_processor(ROWS)
    model = build_model(config, processor, "cpu")
    rows = [task.encode(row, processor).features for row in ROWS]
    batch = task.collate(rows, processor)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = task.loss(model, batch)
        assert loss.count.item() == len(ROWS)
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.total.item())
    assert losses[-1] < losses[0] / 4
    files = model_files(model, config, processor)
    again = restore_model(config, files)
    load_weights(again, {name: tensor.detach().clone() for name, tensor in model.state_dict().items()})
    answers = task.predict(again.eval(), batch, task.load_processor(files), {})
    assert answers == task.predict(model.eval(), batch, processor, {})
    assert task.score(answers, ROWS)["mean_absolute_error"] < 6


def test_a_row_that_the_example_cannot_use_is_a_data_error(loaded: LoadedFile) -> None:
    task = load_task(loaded.config)
    with pytest.raises(DataError, match="column 'source' holds 3, but must be text"):
        task.encode({"source": 3}, task.build_processor(ROWS), answer=True)
