"""transformers' `Trainer`, under torchrun, with the settings that suit this comparison best.

Its batches come in our order, since its loader is ours. `ddp_find_unused_parameters` is switched off, and nothing
is evaluated or saved: all of that would only slow it.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments

from eagleray.config.schema import TrainConfig
from peers.inputs import Inputs, RowDataset, StepTimes, build_loader, read_inputs


class OurBatches(Trainer):  # type: ignore[misc]
    """A `Trainer` that takes its batches from a loader that is given."""

    def __init__(self, *, loader: DataLoader[Any], **arguments: Any) -> None:
        super().__init__(**arguments)
        self._loader = loader

    def get_train_dataloader(self) -> DataLoader[Any]:
        return self._loader


class Clock(TrainerCallback):  # type: ignore[misc]
    """Notes the ends of the steps."""

    def __init__(self, times: StepTimes) -> None:
        self._times = times

    def on_step_end(self, *arguments: Any, **more: Any) -> None:
        self._times.step_ended()


def training_arguments(train: TrainConfig, output_dir: str, world: int) -> TrainingArguments:
    """Say to `Trainer` what our file says."""
    return TrainingArguments(
        output_dir=output_dir,
        max_steps=train.max_steps,
        per_device_train_batch_size=train.global_batch_size // world,
        learning_rate=train.learning_rate,
        lr_scheduler_type=train.lr_scheduler_type,
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        max_grad_norm=train.max_grad_norm,
        optim="adamw_torch_fused",
        logging_steps=train.logging_steps,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        use_cpu=True,
        ddp_backend="gloo",
        ddp_find_unused_parameters=False,
        seed=train.seed,
    )


def run(inputs: Inputs, output_dir: str) -> None:
    """Train, and write the times of the steps."""
    rank, world, times = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), StepTimes()
    trainer = OurBatches(
        loader=build_loader(inputs.train, inputs.task, inputs.processor, inputs.rows, rank=rank, world=world),
        model=inputs.model(),
        args=training_arguments(inputs.train, output_dir, world),
        train_dataset=RowDataset(inputs.rows),
        callbacks=[Clock(times)],
    )
    trainer.train()
    assert len(times.ends) == inputs.num_steps, f"{len(times.ends)} steps instead of {inputs.num_steps}"
    if rank == 0:
        times.write(inputs.times_path)


def main() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        run(read_inputs(), str(Path(folder)))


if __name__ == "__main__":
    main()
