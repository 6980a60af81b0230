"""Promises about a trained translator: the shipped file, trained for a while in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from fake_checkpoint import FakeCheckpoint, weights
from torch import nn

from eagleray.config.loader import load_files
from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.engine import BatchLimits, ItemError, load_engine
from eagleray.engine.decoding import load_generator
from eagleray.engine.options import DecodingOptions
from eagleray.models import build_model, model_files
from eagleray.tasks import Example, Processor, Task, load_task
from eagleray_jobs.data.examples import ExampleReader, SkippedRows
from eagleray_jobs.data.sources import open_source, split_shares

FILE = Path(__file__).parents[2] / "configs" / "en-fr.yaml"
NUM_STEPS, BATCH_SIZE, NUM_HELD_OUT = 500, 64, 400

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def read_examples(config: RunConfig, task: Task) -> tuple[list[Example], list[Example]]:
    """Return training and test examples."""
    reader = ExampleReader(config.data, task.columns, task.input_columns, split_shares(config.data))
    found: dict[str, list[Example]] = {"train": [], "validation": [], "test": []}
    for piece in open_source(config.data).pieces:
        for _, split, example in reader.read(piece, SkippedRows()):
            found[split].append(example)
    return found["train"], found["test"][:NUM_HELD_OUT]


def train(model: nn.Module, task: Task, processor: Processor, examples: list[Example]) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, NUM_STEPS, pct_start=0.1)
    draw = torch.Generator().manual_seed(0)
    features = [task.encode(example, processor).features for example in examples]
    for _ in range(NUM_STEPS):
        rows = [features[i] for i in torch.randint(len(features), (BATCH_SIZE,), generator=draw).tolist()]
        loss = task.loss(model, task.collate(rows, processor))
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[FakeCheckpoint, Any, Task, list[Example]]:
    store = str(tmp_path_factory.mktemp("store"))
    (loaded,) = load_files([str(FILE)], [], store)
    config = loaded.config
    task = load_task(config)
    examples, held_out = read_examples(config, task)
    processor = task.build_processor(iter(examples))
    model = build_model(config, processor, "cpu")
    train(model, task, processor, examples)
    files = model_files(model, config, processor)
    return FakeCheckpoint(config, files, weights(model)), model.eval(), task, held_out


@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("num_beams", [1, 4])
def test_answers_are_those_of_transformers_token_for_token(trained: Any, num_beams: int, backend: Any) -> None:
    checkpoint, model, task, held_out = trained
    processor = task.load_processor(checkpoint.files())
    rows = [task.encode(example, processor, answer=True).features for example in held_out]
    generator = load_generator(model, BatchLimits(48, 100_000), backend=backend)
    assert generator is not None
    ours = generator.generate([row["input_ids"] for row in rows], DecodingOptions(num_beams, max_new_tokens=64))
    theirs: list[list[int]] = []
    for start in range(0, len(rows), 100):
        batch = task.collate(rows[start : start + 100], processor)
        theirs += model.generate(**batch, num_beams=num_beams, max_new_tokens=64, do_sample=False).tolist()
    # With beams, transformers fills with the end token where the padding's number is 0.
    filling = {processor.pad_token_id, model.generation_config.eos_token_id}
    for row, other in zip(ours, theirs, strict=True):
        assert row == other[: len(row)] and set(other[len(row) :]) <= filling


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
@pytest.mark.parametrize("engine", ["torch", "auto"])
def test_lower_precision_costs_less_than_three_tenths_of_chrf(trained: Any, dtype: Any, engine: Any) -> None:
    pytest.importorskip("sacrebleu", reason="pip install 'eagleray[metrics]'")
    checkpoint, _, task, held_out = trained
    scores = []
    for serve in (ServeConfig(), ServeConfig(dtype=dtype, engine=engine)):
        answers = load_engine(checkpoint, serve=serve).answer(held_out)
        plain = [answer for answer in answers if not isinstance(answer, ItemError)]
        scores.append(task.score(plain, held_out)["chrf"])
    exact, lower = scores
    assert exact > 50, "the translator is not trained"
    assert abs(lower - exact) <= 0.3
