"""The bubble of a pipeline, measured from the timelines of its ranks, beside the ideal one.

Our training loop with `train.profile_steps`, without Ray, in two processes of one thread each. The bubble is the
share of the time from the first to the last pass of a step in which ranks compute neither forward nor backward;
the ideal one, (p - 1) / (v m + p - 1), supposes stages that take the same time and messages that take none. `of
these stages` is the ideal of stages as unequal as those measured.

    python benchmarks/pipeline_bubble.py [--quick] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import json
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from layouts import Case, Data, in_fresh_processes, train_ours
from results_page import describe_machine, markdown_table, publish, smoke_and_write_options

from eagleray.parallel.timeline import Span
from eagleray_jobs.train.trace import PASSES, bubble, ideal_bubble

NUM_RANKS = 2
CASE = Case("pp2", width=256, num_layers=4, rows=128, steps=16, train={"profile_steps": [6, 15]})
SETTINGS = (("1F1B", 2, 1), ("1F1B", 4, 1), ("1F1B", 8, 1), ("GPipe", 4, 1), ("Interleaved1F1B", 4, 2))
"""Schedule, micro-batches of a step, stages per rank."""


def record(case: Case, data: Data, folder: str) -> None:
    """Train on this rank; rank 0 leaves the timeline of all ranks in the folder."""
    train_ours(case, data, folder, profile="passes")


def read_spans(folder: Path) -> list[list[Span]]:
    """Return the spans of each rank from the trace of a run."""
    (path,) = folder.glob("runs/*/*/profile/*.json")
    ranks: dict[int, list[Span]] = defaultdict(list)
    for event in json.loads(path.read_bytes())["traceEvents"]:
        if event["ph"] == "X":
            start = round(event["ts"] * 1e3)
            about: dict[str, Any] = event["args"]
            ranks[event["pid"]].append(
                Span(event["cat"], start_ns=start, end_ns=start + round(event["dur"] * 1e3), **about)
            )
    return [ranks[number] for number in sorted(ranks)]


def stage_times(ranks: Sequence[Sequence[Span]], num_micro_batches: int) -> list[float]:
    """Return the milliseconds that each rank computes for one micro-batch, medians over the steps."""
    times = []
    for spans in ranks:
        steps: dict[int, int] = defaultdict(int)
        for span in spans:
            if span.kind in PASSES:
                steps[span.step] += span.end_ns - span.start_ns
        times.append(statistics.median(steps.values()) / num_micro_batches / 1e6)
    return times


def bubble_of_stages(times: Sequence[float], num_micro_batches: int) -> float:
    """Return the bubble of one stage per rank if the slowest never waits between its micro-batches."""
    slowest = max(times)
    makespan = num_micro_batches * slowest + sum(times) - slowest
    return 1 - num_micro_batches * sum(times) / (len(times) * makespan)


def measure(case: Case, data: Data, schedule: str, num_micro_batches: int, stages_per_rank: int) -> list[str]:
    """Train with a schedule and return a row of the table."""
    keys = {"pipeline_parallel_schedule": schedule, "num_microbatches": num_micro_batches}
    with tempfile.TemporaryDirectory() as folder:
        in_fresh_processes(NUM_RANKS, record, replace(case, parallel=keys), data, folder)
        ranks = read_spans(Path(folder))
    found, ideal = bubble(ranks), ideal_bubble(NUM_RANKS, num_micro_batches, stages_per_rank)
    times = stage_times(ranks, num_micro_batches)
    unequal = f"{bubble_of_stages(times, num_micro_batches):.3f}" if stages_per_rank == 1 else ""
    shown = " and ".join(f"{each:.1f}" for each in times)
    return [
        schedule,
        str(num_micro_batches),
        shown,
        f"{found:.3f}",
        f"{ideal:.3f}",
        f"{found / ideal:.2f}",
        unequal,
    ]


def report(machine: str, quick: bool) -> str:
    """Measure everything and return the table."""
    data = Data.prepare()
    rows = [measure(CASE, data, *setting) for setting in (SETTINGS[1:2] if quick else SETTINGS)]
    headers = [
        "schedule, 2 ranks",
        "micro-batches",
        "ms of each rank",
        "bubble",
        "ideal",
        "ratio",
        "of these stages",
    ]
    return f"{machine}. {CASE}; medians of ten steps.\n\n{markdown_table(headers, rows)}"


def main() -> None:
    parser = smoke_and_write_options(__doc__, "bubble", "one schedule")
    options = parser.parse_args()
    publish(report(describe_machine(), options.quick), "bubble", options.write)


if __name__ == "__main__":
    main()
