"""transformers' `Trainer` with FSDP on a CPU, started by torchrun; it says whether anything was sharded.

torchrun --nproc-per-node=2 benchmarks/peers/trainer_fsdp.py WIDTH NUM_LAYERS ROWS STEPS
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from layouts import Case, Data
from torch.distributed.tensor import DTensor

from eagleray.models import build_model
from peers.inputs import RowDataset, StepTimes, build_loader
from peers.trainer import Clock, OurBatches, training_arguments


def run(case: Case, folder: str) -> dict[str, Any]:
    """Train; return the ends of the steps, and how many parameters are sharded."""
    config, times = case.config(), StepTimes()
    assert config.train is not None
    data = Data.prepare()
    task, processor = data.open()
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    arguments = training_arguments(config.train, folder, world)
    arguments.fsdp = True
    arguments.fsdp_config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["MarianEncoderLayer", "MarianDecoderLayer"],
    }
    arguments.fsdp_plugin_args = arguments._process_fsdp_args()
    trainer = OurBatches(
        loader=build_loader(config.train, task, processor, data.rows, rank=rank, world=world),
        model=build_model(config, processor, "cpu"),
        args=arguments,
        train_dataset=RowDataset(data.rows),
        callbacks=[Clock(times)],
    )
    trainer.train()
    model = trainer.model_wrapped
    num_sharded = sum(isinstance(parameter, DTensor) for parameter in model.parameters())
    return {"ends": times.ends, "num_sharded": num_sharded, "wrapped": type(model).__name__}


def main() -> None:
    torch.set_num_threads(1)
    width, num_layers, rows, steps = map(int, sys.argv[1:5])
    with TemporaryDirectory() as folder:
        found = run(Case("fsdp2", width, num_layers, rows, steps), folder)
    if os.environ["RANK"] == "0":
        print(json.dumps(found))


if __name__ == "__main__":
    main()
