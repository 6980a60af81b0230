"""Our training loop beside a hand-written DDP loop: same model, rows, batches, optimizer, threads and processes.

Run it as `python benchmarks/ddp_loop.py`. Two gloo workers of one thread each take turns: one round of ours, one
of theirs, and so on; the table shows medians. The peer is `peers/ddp.py`. Without Ray, and with both in the same
processes, it is less noisy than `training_speed.py`, and the place to look for what a step costs.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from peers.ddp import exchanging, train_by_hand
from peers.inputs import build_loader

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_model
from eagleray.parallel import build_mesh
from eagleray.store.objects import ObjectStore
from eagleray.store.runs import RunHandle
from eagleray.store.saver import SaveResult
from eagleray.tasks import Features, Processor, Task, load_task
from eagleray_jobs.data.cldr import translation_examples
from eagleray_jobs.data.split import SplitShares
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.loop import run_loop
from eagleray_jobs.train.metrics import JsonlFile
from eagleray_jobs.train.parts import Parts
from eagleray_jobs.train.spec import MetricRecord, WorkerSpec

NUM_WORKERS = 2
NUM_ROWS = 4_000
WARMUP_STEPS = 5


def make_config(steps: int) -> RunConfig:
    """The model of the shipped `en-fr` file."""
    return RunConfig.model_validate(
        {
            "name": "bench",
            "task": "translation",
            "model": {
                "family": "marian",
                "config": {
                    "d_model": 128,
                    "encoder_layers": 2,
                    "decoder_layers": 2,
                    "encoder_attention_heads": 4,
                    "decoder_attention_heads": 4,
                    "encoder_ffn_dim": 512,
                    "decoder_ffn_dim": 512,
                    "max_position_embeddings": 128,
                    "dropout": 0.0,
                },
            },
            "data": {"source": "cldr-en-fr"},
            "train": {"max_steps": steps, "global_batch_size": 64, "learning_rate": 1e-3, "warmup_steps": 0.1},
            "parallel": {"data_parallel_replicate_degree": NUM_WORKERS},
        }
    )


class EncodedRows:
    """Tokenised rows in memory."""

    def __init__(self, task: Task, processor: Processor, examples: list[dict[str, str]]) -> None:
        encoded = [task.encode(example, processor) for example in examples]
        self.rows = [row.features for row in encoded]
        self.lengths = np.array([row.length for row in encoded])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Features:
        return self.rows[index]


@dataclass
class Stopwatch:
    """Notes the same moment of each step; for our loop it is a `Control`."""

    moments: list[float] = field(default_factory=list)

    def tick(self) -> None:
        self.moments.append(time.perf_counter())

    def stop_requested(self) -> bool:
        self.tick()
        return False

    def log(self, record: MetricRecord) -> None: ...

    def saved(self, result: SaveResult) -> None: ...

    def step_s(self) -> float:
        """Mean seconds of a step, the first ones left out."""
        return (self.moments[-1] - self.moments[WARMUP_STEPS]) / (len(self.moments) - 1 - WARMUP_STEPS)


class NoSaver:
    """Commits nothing."""

    def save(self, **parts: Mapping[str, Any]) -> None: ...

    def poll(self) -> list[SaveResult]:
        return []

    def wait(self) -> list[SaveResult]:
        return []

    def close(self) -> None: ...


def ours(config: RunConfig, task: Task, processor: Processor, rows: EncodedRows, folder: str) -> float:
    """Seconds per step of `run_loop`."""
    layout, device, watch = Layout(replicate=NUM_WORKERS), torch.device("cpu"), Stopwatch()
    parts = Parts(
        model=build_model(config, processor, device),
        task=task,
        processor=processor,
        train=rows,
        validation=None,
        device=device,
        mesh=build_mesh(layout, "cpu"),
        exchange=Exchange(60.0),
        files={},
        saver=NoSaver(),  # type: ignore[arg-type]
        sinks=lambda step: [JsonlFile(Path(folder) / "metrics.jsonl", step)],
    )
    run = RunHandle(ObjectStore.open(folder), "bench", 1, 1, "a")
    assert config.train is not None and config.train.max_steps is not None
    run_loop(WorkerSpec(config, run, "unused", layout, config.train.max_steps), parts, watch)
    return watch.step_s()


def by_hand(config: RunConfig, task: Task, processor: Processor, rows: EncodedRows, folder: str) -> float:
    """Seconds per step of a loop as one writes it for torchrun."""
    assert config.train is not None
    watch, rank = Stopwatch(), dist.get_rank()
    loader = build_loader(config.train, task, processor, rows, rank=rank, world=NUM_WORKERS)
    with (Path(folder) / "by_hand.txt").open("a") as log:
        train_by_hand(exchanging(build_model(config, processor, "cpu")), config.train, loader, log, watch.tick)
    return watch.step_s()


def work(rank: int, rendezvous: str, rounds: int, steps: int, results: Any) -> None:
    """Alternate the two on one rank."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=NUM_WORKERS)
    config = make_config(steps)
    task = load_task(config)
    examples = list(islice(translation_examples("en", "fr", SplitShares(0.0, 0.0)), NUM_ROWS))
    processor = task.build_processor(examples)
    rows = EncodedRows(task, processor, examples)
    with TemporaryDirectory() as folder:
        for number in range(rounds):
            pair = (ours, by_hand) if number % 2 == 0 else (by_hand, ours)
            seconds = {side.__name__: side(config, task, processor, rows, folder) for side in pair}
            if rank == 0:
                results.put(seconds)
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    results = mp.get_context("spawn").SimpleQueue()
    with TemporaryDirectory() as folder:
        arguments = (f"{folder}/rendezvous", options.rounds, options.steps, results)
        mp.spawn(work, arguments, nprocs=NUM_WORKERS)  # type: ignore[no-untyped-call, attr-defined]
    rounds = [results.get() for _ in range(options.rounds)]
    medians = {side: statistics.median(found[side] for found in rounds) for side in ("ours", "by_hand")}
    ratios = [found["by_hand"] / found["ours"] for found in rounds]
    print(
        f"{NUM_WORKERS} gloo workers, one thread each; {options.rounds} rounds of {options.steps} steps; medians"
    )
    print(f"{'loop':<14}{'ms/step':>10}{'steps/s':>10}")
    for side, median in medians.items():
        print(f"{side:<14}{median * 1e3:>10.2f}{1 / median:>10.2f}")
    print(f"ours / by hand: {statistics.median(ratios):.3f} (of rounds: {min(ratios):.3f} .. {max(ratios):.3f})")


if __name__ == "__main__":
    main()
