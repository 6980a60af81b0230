"""A DDP loop as one writes it by hand for torchrun.

Its loss is the mean of each rank's own mean, so it is not quite right with lengths that differ. It has no restart,
no checkpoints, and no check for NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import IO

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from eagleray.config.schema import TrainConfig
from eagleray.tasks import Batch
from eagleray_jobs.train.schedule import learning_rate
from peers.inputs import StepTimes, build_loader, read_inputs


def train_by_hand(
    model: nn.Module, train: TrainConfig, batches: Iterable[Batch], log: IO[str], step_ended: Callable[[], None]
) -> None:
    """Train on this rank's batches, one step each."""
    assert train.max_steps is not None
    optimizer = torch.optim.AdamW(model.parameters(), lr=train.learning_rate, weight_decay=0.0, fused=True)
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(train, step, train.max_steps)
        optimizer.zero_grad()
        loss = _mean_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % train.logging_steps == 0 and dist.get_rank() == 0:
            print(step, loss.item(), norm.item(), file=log, flush=True)
        step_ended()


def exchanging(model: nn.Module) -> nn.Module:
    """Have gradients averaged over the workers, if there are several."""
    return DistributedDataParallel(model, gradient_as_bucket_view=True) if dist.get_world_size() > 1 else model


def _mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "decoder_input_ids")}
    logits = model(**inputs, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100)


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    inputs, times = read_inputs(), StepTimes()
    rank, world = dist.get_rank(), dist.get_world_size()
    loader = build_loader(inputs.train, inputs.task, inputs.processor, inputs.rows, rank=rank, world=world)
    model = exchanging(inputs.model()) if inputs.exchange else inputs.model()
    with open(os.devnull, "w") if rank else inputs.times_path.with_suffix(".log").open("w") as log:
        train_by_hand(model, inputs.train, loader, log, times.step_ended)
    if rank == 0:
        times.write(inputs.times_path)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
