"""Training on one GPU: tokens per second and the share of the device's arithmetic (MFU), in bfloat16 and compiled.

Our training loop without Ray, in one process. MFU is the floating-point operations of the model's matrix products
and attention, forward and backward, as torch counts them, divided by what the device could do in bfloat16 in that
time (Chowdhery et al. 2022, PaLM, arXiv 2204.02311). Where there is no GPU it says so and ends with status 0.

    python benchmarks/gpu.py [--peak-tflops 989] [--steps 60]
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from layouts import MAX_LENGTH, Case, Data, FullRows, in_fresh_processes, train_ours
from results_page import markdown_table

NUM_SKIPPED = 20
CASE = Case("single", width=1024, num_layers=6, rows=64, steps=60)
SETTINGS: Mapping[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16": {"bf16": True},
    "bfloat16, torch.compile": {"bf16": True, "torch_compile": True},
}
PEAK_TFLOPS = {
    "H200": 989.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "A10": 125.0,
    "V100": 125.0,
}
"""Dense bfloat16 (V100: float16) by parts of the device's name, from NVIDIA's data sheets."""


@dataclass(frozen=True, slots=True)
class Found:
    """What one setting gave.

    Attributes:
        step_s: Seconds of a step.
        tokens: Tokens of a step, source and target.
        flops: Floating-point operations of a step.
        losses: Of the logged steps.
    """

    step_s: float
    tokens: int
    flops: int
    losses: list[float]


def run(case: Case, data: Data, device: str) -> Found:
    """Train on this process's device."""
    _, processor = data.open()
    rows = FullRows(len(processor.tokenizer), 512)
    with tempfile.TemporaryDirectory() as folder:
        clock = train_ours(case, data, folder, device=device, rows=rows)
    return Found(
        clock.step_s(NUM_SKIPPED), 2 * MAX_LENGTH * case.rows, count_flops(case, data, rows), clock.losses
    )


def count_flops(case: Case, data: Data, rows: FullRows) -> int:
    """Return the operations of a step: those of one row on a CPU, times the rows."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from eagleray.models import build_model

    task, processor = data.open()
    model = build_model(case.config(), processor, "cpu")
    batch = task.collate([rows[0]], processor)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.backward(task.loss(model, batch).total)
    return int(counter.get_total_flops()) * case.rows


def find_peak(name: str, given: float | None) -> float | None:
    """Return the device's bfloat16 TFLOP/s; None: it is not known, and no MFU is shown."""
    return given or next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)


def report(name: str, peak_tflops: float | None, steps: int) -> str:
    """Measure every setting and return the table."""
    data, rows = Data.prepare(), []
    for setting, train in SETTINGS.items():
        case = replace(CASE, steps=steps, train={"logging_steps": steps, **train})
        (found,) = in_fresh_processes(1, run, case, data, "cuda", device_type="cuda")
        mfu = "" if peak_tflops is None else f"{found.flops / found.step_s / (peak_tflops * 1e12):.1%}"
        rows.append([setting, f"{1 / found.step_s:.2f}", f"{found.tokens / found.step_s:.0f}", mfu])
    about = (
        f"{name}, peak {peak_tflops} TFLOP/s (bfloat16). Translator of width {CASE.width}, {CASE.num_layers} + "
        f"{CASE.num_layers} layers, {CASE.rows} rows of {MAX_LENGTH} + {MAX_LENGTH} tokens per step; steps "
        f"{NUM_SKIPPED + 1} to {steps}."
    )
    return f"{about}\n\n{markdown_table(['one GPU', 'steps/s', 'tokens/s', 'MFU'], rows)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peak-tflops", type=float, help="what the device can do, where its name does not tell")
    parser.add_argument("--steps", type=int, default=CASE.steps)
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available():
        print("There is no GPU on this machine: tokens/s and MFU of one device were not measured.")
        return
    name = torch.cuda.get_device_name()
    print(report(name, find_peak(name, options.peak_tflops), options.steps))


if __name__ == "__main__":
    main()
