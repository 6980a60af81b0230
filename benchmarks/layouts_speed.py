"""Steps per second of each layout beside the same layout written by hand with plain torch.

Our training loop and the peer's (`peers/layouts.py`, `peers/ddp.py`) take turns in the same processes, one thread
each, without Ray: same model, rows, batches, optimizer and clipping. Speeds are medians over the rounds, ratios
the medians of the rounds' ratios; the first steps of each round are left out.

    python benchmarks/layouts_speed.py [--rounds 5] [--quick] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist
from layouts import Case, Clock, Data, spread, train_ours
from peers.inputs import build_loader
from results_page import describe_machine, markdown_table, publish, smoke_and_write_options

from eagleray.models import build_model
from eagleray_jobs.verify.ranks import RankGroups

TARGET = 0.95
ROUND_TIMEOUT_S, TRAINER_TIMEOUT_S, COLLECTIVE_TIMEOUT_S = 120.0, 240.0, 120.0
TRAINER = Path(__file__).parent / "peers" / "trainer_fsdp.py"
NUM_SKIPPED = 10
NUM_MICRO_BATCHES = 4
CASE = Case("ddp2", width=128, num_layers=2, rows=64, steps=30)
LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2", "hsdp2x2", "fsdp2.tp2")


@dataclass(frozen=True, slots=True)
class Round:
    """Steps per second of the two in one round."""

    ours: float
    by_hand: float


def train_by_hand(case: Case, data: Data) -> Clock:
    """Run the peer's loop on this rank."""
    from peers import layouts
    from peers.ddp import exchanging
    from peers.ddp import train_by_hand as train_ddp

    config, clock, layout = case.config(), Clock(), case.degrees
    assert config.train is not None
    task, processor = data.open()
    model = build_model(config, processor, "cpu")
    rank = dist.get_rank() // layout.tensor if layout.pipeline == 1 else 0
    loader = build_loader(config.train, task, processor, data.rows, rank=rank, world=layout.num_data_ranks)
    cuts = {
        "fsdp2": layouts.shard,
        "hsdp2x2": layouts.shard_and_replicate,
        "tp2": layouts.cut_tensors,
        "fsdp2.tp2": layouts.cut_and_shard,
    }
    if case.layout == "pp2":
        layouts.train_pipeline(model, config.train, loader, clock.tick)
    elif case.layout in cuts:
        layouts.train_model(model, cuts[case.layout], config.train, loader, clock.tick)
    else:
        with tempfile.TemporaryFile("w") as log:
            train_ddp(exchanging(model), config.train, loader, log, clock.tick)
    return clock


def alternate(case: Case, data: Data, num_rounds: int) -> list[Round]:
    """Let the two take turns on this rank."""
    rounds = []
    for number in range(num_rounds):
        found: dict[str, float] = {}
        sides: list[tuple[str, Callable[[], Clock]]] = [("by_hand", lambda: train_by_hand(case, data))]
        with tempfile.TemporaryDirectory() as folder:
            sides.insert(number % 2, ("ours", lambda folder=folder: train_ours(case, data, folder)))  # type: ignore[misc]
            for name, run in sides:
                found[name] = 1 / run().step_s(NUM_SKIPPED)
                dist.barrier()
        rounds.append(Round(**found))
    return rounds


def measure(groups: RankGroups, case: Case, data: Data, num_rounds: int) -> list[str]:
    """Return a layout's row."""
    group = groups(case.degrees.num_workers)
    rounds: list[Round] = group.run(alternate, case, data, num_rounds, timeout_s=num_rounds * ROUND_TIMEOUT_S)[0]
    ours, by_hand = [each.ours for each in rounds], [each.by_hand for each in rounds]
    ratios = [each.ours / each.by_hand for each in rounds]
    print(f"{case.layout}: ours / by hand {spread(ratios, 3)}", file=sys.stderr, flush=True)
    speeds = [f"{statistics.median(ours):.2f}", spread(ours), f"{statistics.median(by_hand):.2f}", spread(by_hand)]
    return [case.layout, *speeds, f"{statistics.median(ratios):.3f}", f">= {TARGET}"]


def ask_trainer(case: Case) -> str:
    """Train with transformers' `Trainer` and `fsdp=True` under torchrun, and say what came of it."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(TRAINER)]
    words += [str(number) for number in (case.width, case.num_layers, case.rows, case.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=TRAINER_TIMEOUT_S)
    version = importlib.metadata.version("accelerate")
    about = f"transformers' `Trainer` with `fsdp=True` on two CPU processes (accelerate {version})"
    if done.returncode:
        return f"{about} fails: {done.stderr.strip().splitlines()[-1]}"
    found = json.loads(done.stdout.splitlines()[-1])
    speed = (case.steps - NUM_SKIPPED) / (found["ends"][-1] - found["ends"][NUM_SKIPPED - 1])
    if not found["num_sharded"]:
        return f"{about} shards nothing: it trains a {found['wrapped']}, {speed:.2f} steps/s."
    return f"{about}: {speed:.2f} steps/s."


def report(machine: str, layouts: Sequence[str], num_rounds: int, quick: bool) -> str:
    """Measure everything and return the table."""
    data = Data.prepare()
    case = replace(CASE, parallel={"num_microbatches": NUM_MICRO_BATCHES})
    if quick:
        case, num_rounds = replace(case, steps=15), 1
    with RankGroups(COLLECTIVE_TIMEOUT_S) as groups:
        rows = [measure(groups, replace(case, layout=layout), data, num_rounds) for layout in layouts]
    about = (
        f"{machine}. {case}, 1F1B with {NUM_MICRO_BATCHES} micro-batches; {num_rounds} rounds, steps "
        f"{NUM_SKIPPED + 1} to {case.steps} of each."
    )
    headers = ["layout", "ours, steps/s", "slowest to fastest", "by hand", "slowest to fastest", "ratio", "target"]
    return "\n\n".join([about, markdown_table(headers, rows), ask_trainer(replace(case, layout="fsdp2"))])


def main() -> None:
    parser = smoke_and_write_options(__doc__, "layouts", "one round of few steps")
    parser.add_argument("--layouts", default=",".join(LAYOUTS), help="which ones")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each layout")
    options = parser.parse_args()
    publish(
        report(describe_machine(), options.layouts.split(","), options.rounds, options.quick),
        "layouts",
        options.write,
    )


if __name__ == "__main__":
    main()
