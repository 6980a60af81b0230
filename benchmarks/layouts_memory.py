"""Memory of each layout: weights, gradients and optimizer state beside ZeRO's formula, and the peak of a process.

Our training loop, without Ray, in fresh processes of one thread each. The bytes are those of the memory that the
tensors of the fullest rank keep alive after an update; the formula is that of ZeRO's stage 3 (Rajbhandari et al.
2019, arXiv 1910.02054) for its parameters. The peak is the largest resident memory without mapped files, less what
the process held before it built the model.

    python benchmarks/layouts_memory.py [memory | recomputation] [--quick] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import sys
import tempfile
import threading
from dataclasses import dataclass, field, replace
from typing import Any

from layouts import MAX_LENGTH, Case, Data, FullRows, in_fresh_processes, megabytes, train_ours
from results_page import describe_machine, markdown_table, publish, smoke_and_write_options

STATE = Case("single", width=512, num_layers=4, rows=16, steps=3)
"""About 30 million parameters, so that layers outweigh all that a process holds besides."""
ACTIVATIONS = replace(STATE, width=256, rows=8, steps=2)
"""With rows as long as may be, so that activations outweigh the state."""
LAYOUTS = ("ddp2", "fsdp2", "tp2", "pp2", "hsdp2x2", "fsdp4", "fsdp2.tp2", "pp2.fsdp2", "pp2.tp2")
RECOMPUTED = ("ddp2", "fsdp2", "tp2", "pp2")
POLL_S = 0.005


@dataclass
class Watch:
    """Looks at this process's memory while it trains, and at what it holds after updates; a `Probe`."""

    layout: Any
    peak: int = 0
    held: Any = None
    formula: Any = None
    module: Any = None
    closed: threading.Event = field(default_factory=threading.Event)

    def cut(self, module: Any) -> None:
        self.module = module

    def backward(self, step: int, scale: float) -> None: ...

    def updated(self, optimizer: Any, *_: object) -> None:
        from eagleray.parallel.footprint import measure_footprint, zero_footprint

        parameters = list(self.module.parameters())
        self.held = measure_footprint(parameters, optimizer)
        sizes = [sum(p.numel() for p in parameters if p.requires_grad is kind) for kind in (True, False)]
        self.formula = zero_footprint(*sizes, self.layout)

    def look(self) -> None:
        from eagleray_jobs.train.memory import own_memory_bytes

        while not self.closed.wait(POLL_S):
            self.peak = max(self.peak, own_memory_bytes())


@dataclass(frozen=True, slots=True)
class Found:
    """What a rank held: after updates, by the formula, and at most."""

    held: Any
    formula: Any
    peak: int


def measure_rank(case: Case, data: Data, full_rows: bool) -> Found:
    """Train on this rank and watch it."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    from eagleray_jobs.train.memory import own_memory_bytes

    _, processor = data.open()  # so that it imports what it needs before the memory is taken
    rows = FullRows(len(processor.tokenizer), 2 * case.rows) if full_rows else data.rows
    watch, before = Watch(case.degrees), own_memory_bytes()
    hook = register_optimizer_step_post_hook(watch.updated)
    threading.Thread(target=watch.look, daemon=True).start()
    with tempfile.TemporaryDirectory() as folder:
        train_ours(case, data, folder, probe=watch, rows=rows)
    watch.closed.set()
    hook.remove()
    return Found(watch.held, watch.formula, watch.peak - before)


def measure(case: Case, data: Data, *, full_rows: bool = False) -> Found:
    """Return what the fullest rank held, and the highest peak."""
    ranks = in_fresh_processes(case.degrees.num_workers, measure_rank, case, data, full_rows)
    fullest = max(ranks, key=lambda each: each.held.total)
    return replace(fullest, peak=max(each.peak for each in ranks))


def state_table(case: Case, data: Data, layouts: tuple[str, ...]) -> str:
    rows = []
    for layout in layouts:
        found = measure(replace(case, layout=layout), data)
        held, formula = found.held, found.formula
        parts = [megabytes(n) for n in (held.parameters, held.gradients, held.optimizer, held.total)]
        off = held.total / formula.total - 1
        print(f"{layout}: {parts[-1]} MB, peak {megabytes(found.peak)} MB", file=sys.stderr, flush=True)
        rows.append([layout, *parts, megabytes(formula.total), f"{off:+.1%}", megabytes(found.peak)])
    headers = ["MB", "weights", "gradients", "optimizer", "sum", "formula", "off by", "peak of a process"]
    return markdown_table(headers, rows)


def recomputation_table(case: Case, data: Data, layouts: tuple[str, ...]) -> str:
    rows = []
    for layout in layouts:
        peaks = []
        for mode in ("none", "selective", "full"):
            changed = replace(case, layout=layout, parallel={"activation_checkpointing": mode})
            found = measure(changed, data, full_rows=True)
            peaks.append(megabytes(found.peak))
        print(f"{layout}: peaks {', '.join(peaks)} MB", file=sys.stderr, flush=True)
        rows.append([layout, *peaks])
    return markdown_table(["peak of a process, MB", "none", "selective", "full"], rows)


def report_state(machine: str, data: Data, quick: bool) -> str:
    """Measure what layouts hold, and return the table."""
    table = state_table(STATE, data, LAYOUTS[:2] if quick else LAYOUTS)
    return f"{machine}. {STATE}, AdamW, float32.\n\n{table}"


def report_recomputation(machine: str, data: Data, quick: bool) -> str:
    """Measure what recomputing activations spares, and return the table."""
    table = recomputation_table(ACTIVATIONS, data, RECOMPUTED[:1] if quick else RECOMPUTED)
    return f"{machine}. {ACTIVATIONS}, of {MAX_LENGTH} tokens each.\n\n{table}"


REPORTS = {"memory": report_state, "recomputation": report_recomputation}


def main() -> None:
    parser = smoke_and_write_options(__doc__, "memory` or `recomputation", "few layouts")
    parser.add_argument("what", choices=tuple(REPORTS), nargs="*", help="both by default")
    options = parser.parse_args()
    data = Data.prepare()
    for section in options.what or REPORTS:
        publish(REPORTS[section](describe_machine(), data, options.quick), section, options.write)


if __name__ == "__main__":
    main()
