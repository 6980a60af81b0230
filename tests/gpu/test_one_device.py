"""One GPU trains in bfloat16 and compiled; its passes are timed on the device."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import Data, in_fresh_processes, train_ours

import gpu

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]
SMALL = replace(gpu.CASE, width=256, num_layers=2, rows=8, steps=40)


@pytest.mark.parametrize("train", [{}, {"bf16": True}, {"bf16": True, "torch_compile": True}])
def test_a_setting_trains_and_is_measured(train: dict[str, Any]) -> None:
    case = replace(SMALL, train={"logging_steps": 10, **train})
    (found,) = in_fresh_processes(1, gpu.run, case, Data.prepare(), "cuda", device_type="cuda")
    assert found.step_s > 0 and found.tokens == 2 * gpu.MAX_LENGTH * SMALL.rows
    assert found.losses[-1] < found.losses[0]


def test_operations_are_counted_as_six_for_each_weight_and_token() -> None:
    rows = gpu.FullRows(2000, 4)
    layers = 2 * 12 * SMALL.width**2 + 2 * 16 * SMALL.width**2  # two of an encoder and two of a decoder
    head = 2000 * SMALL.width
    expected = 6 * gpu.MAX_LENGTH * SMALL.rows * (layers + head)
    assert gpu.count_flops(SMALL, Data.prepare(), rows) == pytest.approx(
        expected, rel=0.15
    )  # attention comes on top


def record(folder: str) -> None:
    train_ours(
        replace(SMALL, train={"profile_steps": [20, 22]}), Data.prepare(), folder, device="cuda", profile="passes"
    )


def test_passes_are_timed_on_the_device(tmp_path: Path) -> None:
    in_fresh_processes(1, record, str(tmp_path), device_type="cuda")
    (path,) = tmp_path.glob("runs/*/*/profile/*.json")
    spans = [event for event in json.loads(path.read_bytes())["traceEvents"] if event["ph"] == "X"]
    steps = {span["args"]["step"]: span for span in spans if span["cat"] == "step"}
    assert steps.keys() == {20, 21, 22}
    for span in spans:
        outer = steps[span["args"]["step"]]
        assert outer["ts"] - 1 <= span["ts"] and span["ts"] + span["dur"] <= outer["ts"] + outer["dur"] + 1
    assert all(span["dur"] > 0 for span in spans if span["cat"] in ("forward", "backward"))
