"""What every peer starts from: our model, rows and batches in our order; and the clock of its steps."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.utils.data import DataLoader, Dataset

from eagleray.config.schema import RunConfig, TrainConfig
from eagleray.models import build_model
from eagleray.store.objects import ObjectStore
from eagleray.tasks import Features, Processor, Task, load_task
from eagleray_jobs.data.cursor import Cursor
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.train.batches import Rows


@dataclass(slots=True)
class StepTimes:
    """When each step ended, in seconds of the machine's monotonic clock, which all its processes share."""

    ends: list[float] = field(default_factory=list)

    def step_ended(self) -> None:
        self.ends.append(time.monotonic())

    def write(self, path: Path) -> None:
        path.write_text(json.dumps(self.ends))


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a peer is given.

    Attributes:
        config: The file that `eagleray train` runs.
        task: Collates and names the model.
        processor: Of the prepared data.
        rows: The training split.
        times_path: Where rank 0 writes the ends of the steps.
        exchange: Whether workers exchange gradients.
    """

    config: RunConfig
    task: Task
    processor: Processor
    rows: Rows
    times_path: Path
    exchange: bool = True

    @property
    def train(self) -> TrainConfig:
        """The `train` section."""
        assert self.config.train is not None
        return self.config.train

    @property
    def num_steps(self) -> int:
        """Optimizer steps of the run."""
        assert self.train.max_steps is not None
        return self.train.max_steps

    def model(self) -> nn.Module:
        """Build the model that our run starts from."""
        return build_model(self.config, self.processor, "cpu")


def read_inputs() -> Inputs:
    """Open what the command line names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", type=Path, required=True, help="the file that `eagleray train` runs")
    parser.add_argument("--data", required=True, help="fingerprint of the data that it prepared")
    parser.add_argument("--times", type=Path, required=True, help="where the times of the steps go")
    parser.add_argument("--no-exchange", action="store_true", help="each worker trains a model of its own")
    options = parser.parse_args()
    config = RunConfig.model_validate(yaml.safe_load(options.config.read_text()))
    assert config.store is not None
    task = load_task(config)
    data = PreparedData(ObjectStore.open(config.store), options.data)
    processor = task.load_processor(data.processor_files)
    return Inputs(config, task, processor, data.split("train"), options.times, not options.no_exchange)


class RowDataset(Dataset[Features]):
    """Prepared rows as torch's loader takes them."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Features:
        return self._rows[index]


def build_loader(
    train: TrainConfig, task: Task, processor: Processor, rows: Rows, *, rank: int, world: int
) -> DataLoader[Any]:
    """Make torch's own loader, in the training's process; its batches are a rank's share of our global batches."""
    assert train.max_steps is not None
    cursor = Cursor(len(rows), train.global_batch_size, train.seed)
    size = train.global_batch_size
    own = slice(rank * size // world, (rank + 1) * size // world)
    batches = [cursor.batch(step)[own].tolist() for step in range(train.max_steps)]
    return DataLoader(
        RowDataset(rows), batch_sampler=batches, collate_fn=lambda examples: task.collate(examples, processor)
    )
