"""Training beside its peers: steps per second, more workers, what saves cost, and the way to the first step.

`eagleray train` as users call it, a DDP loop written by hand for torchrun, and transformers' `Trainer` under
torchrun train the model of `configs/en-fr.yaml` on the same prepared rows, in the same batches, with gloo and one
thread per worker. They take turns: one round of all of them, then the next one, in another order. Tables show
medians. The first steps of every run are left out.

    python benchmarks/training_speed.py [--quick] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Timer

import yaml
from results_page import describe_machine, write_section
from training_results import (
    PHASES,
    QUICK,
    SIDES,
    Kind,
    Measured,
    Plan,
    Run,
    Side,
    logged_steps_per_s,
    make_config,
    report,
)

ROOT = Path(__file__).resolve().parents[1]
MODEL_FILE = ROOT / "configs" / "en-fr.yaml"
RUN_TIMEOUT_S = 150.0
END_TIMEOUT_S = 60.0
PEERS: Mapping[Kind, tuple[str, ...]] = {
    "by hand": ("peers.ddp",),
    "apart": ("peers.ddp", "--no-exchange"),
    "Trainer": ("peers.trainer",),
}


class Bench:
    """Runs the sides, each in processes of its own, in one folder."""

    def __init__(self, folder: Path, plan: Plan) -> None:
        self._folder, self._plan, self._store = folder, plan, folder / "store"
        self._shipped = yaml.safe_load(MODEL_FILE.read_text())
        path = os.pathsep.join([str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        self._env |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}
        self._env |= {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}

    def measure(self) -> Measured:
        """Run every side once in each round."""
        runs: Measured = {side: [] for side in SIDES}
        for number in range(self._plan.num_rounds):
            for side in (*SIDES[number % len(SIDES) :], *SIDES[: number % len(SIDES)]):
                run = self._run(side, f"{side.name}-{number}")
                runs[side].append(run)
                shown = f"{run.steps_per_s:.2f} steps/s, first step after {run.first_step_s:.1f} s"
                print(f"round {number + 1}, {side.name}: {shown}", file=sys.stderr, flush=True)
        return runs

    def _run(self, side: Side, name: str) -> Run:
        config = self._folder / f"{name}.yaml"
        config.write_text(yaml.safe_dump(make_config(self._shipped, side, self._plan, name, self._store)))
        return (
            self._run_ours(side, name, config) if side.kind == "eagleray" else self._run_peer(side, name, config)
        )

    def _run_ours(self, side: Side, name: str, config: Path) -> Run:
        """Run `eagleray train`; its own records give the speed, one of its lines the moment of the first step."""
        words = (sys.executable, "-m", "eagleray.cli", "train", str(config), "--json")
        lines, stdout = run_to_end(words, self._env, self._folder / f"{name}.out")
        (first_step_s,) = (at_s for at_s, line in lines if line.startswith("train ("))
        text = (self._store / "runs" / name / "r1" / "metrics.jsonl").read_text()
        records = [json.loads(line) for line in text.splitlines()]
        speed = logged_steps_per_s(records, self._plan.num_skipped, side.batch_size)
        phases_s = json.loads(stdout.splitlines()[-1])["phases_s"]
        return Run(speed, first_step_s, {phase: phases_s[phase] for phase in PHASES})

    def _run_peer(self, side: Side, name: str, config: Path) -> Run:
        """Run a peer under torchrun; it writes when its steps ended."""
        (fingerprint,) = (path.name for path in (self._store / "data").iterdir())
        times = self._folder / f"{name}.times"
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += [f"--nproc-per-node={side.num_workers}", "-m", *PEERS[side.kind]]
        words += ["--config", str(config), "--data", fingerprint, "--times", str(times)]
        started = time.monotonic()
        run_to_end(words, self._env, self._folder / f"{name}.out")
        ends = json.loads(times.read_text())
        speed = (len(ends) - self._plan.num_skipped) / (ends[-1] - ends[self._plan.num_skipped - 1])
        return Run(speed, ends[0] - started)


def run_to_end(words: Sequence[str], env: Mapping[str, str], out: Path) -> tuple[list[tuple[float, str]], str]:
    """Run a command; return its lines on standard error, each with the second it came in, and its standard output.

    Raises:
        SystemExit: It failed, or took longer than `RUN_TIMEOUT_S`; its last lines are shown.
    """
    started = time.monotonic()
    with out.open("w") as stdout:
        process = subprocess.Popen(words, env=dict(env), stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    timer = Timer(RUN_TIMEOUT_S, process.terminate)
    timer.start()
    try:
        lines = [(time.monotonic() - started, line) for line in process.stderr]
        status = process.wait(END_TIMEOUT_S)
    finally:
        timer.cancel()
        process.kill()  # nothing to a process that has ended
    if status:
        raise SystemExit(
            f"{' '.join(words)} ended with status {status}\n{''.join(line for _, line in lines[-40:])}"
        )
    return lines, out.read_text()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few steps: a smoke run, no measurement")
    parser.add_argument("--rounds", type=int, help="rounds of all sides")
    parser.add_argument(
        "--write", type=Path, metavar="FILE", help="replace the section `training` of this document"
    )
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    plan = replace(plan, num_rounds=options.rounds or plan.num_rounds)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="eagleray-bench-") as folder:
        runs = Bench(Path(folder), plan).measure()
    text = report(runs, plan, machine)
    print(text)
    if options.write is not None:
        write_section(options.write, "training", text)


if __name__ == "__main__":
    main()
