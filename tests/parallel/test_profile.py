"""`train.profile_steps`: what all ranks did in some steps, in the run's folder of the store."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from ranks import RankGroup
from training import Job, make_config, train

from eagleray.config.schema import RunConfig

Groups = Callable[[int], RankGroup]
Event = dict[str, Any]
STEPS = {2, 3}
STEPS_KEYS: dict[str, Any] = {"profile_steps": [2, 3], "max_steps": 4, "save_steps": 3}


def spans_of(group: Groups, folder: Path, layout: dict[str, Any], **keys: Any) -> list[Event]:
    """Train four steps of which two are recorded; return what the trace of the two has."""
    file = make_config("text-classification", layout=layout, **STEPS_KEYS, **keys).model_dump()
    file["model"]["config"]["num_hidden_layers"] = 4
    config = RunConfig.model_validate(file)
    group(2).run(train, Job(config, str(folder)))
    trace, drawing = sorted((folder / "runs/tiny/r1/profile").iterdir())
    assert [trace.name, drawing.name] == [f"steps-00000002-00000003.{kind}" for kind in ("json", "svg")]
    ElementTree.fromstring(drawing.read_text())
    return [event for event in json.loads(trace.read_bytes())["traceEvents"] if event["ph"] == "X"]


def assert_nested(spans: list[Event]) -> None:
    """Two spans of a row lie apart, or one lies in the other; and all lie in a step of their number."""
    for rank in {span["pid"] for span in spans}:
        open_until: list[float] = []
        row = [span for span in spans if span["pid"] == rank and span["tid"] == 0]
        for span in sorted(row, key=lambda each: (each["ts"], -each["dur"])):
            while open_until and open_until[-1] <= span["ts"] + 1e-3:
                open_until.pop()
            assert not open_until or span["ts"] + span["dur"] <= open_until[-1] + 1e-3
            open_until.append(span["ts"] + span["dur"])
        steps = {span["args"]["step"]: span for span in row if span["cat"] == "step"}
        assert steps.keys() == STEPS
        for span in row:
            outer = steps[span["args"]["step"]]
            assert outer["ts"] <= span["ts"] and span["ts"] + span["dur"] <= outer["ts"] + outer["dur"] + 1e-3


@pytest.mark.parametrize(
    "schedule, num_stages",
    [("1F1B", 2), pytest.param("GPipe", 2, marks=pytest.mark.slow), ("Interleaved1F1B", 4)],
)
def test_every_micro_batch_passes_every_stage_forward_and_backward(
    group: Groups, tmp_path: Path, schedule: str, num_stages: int
) -> None:
    layout = {
        "pipeline_parallel_degree": 2,
        "pipeline_parallel_schedule": schedule,
        "num_microbatches": 4,
    }
    spans = spans_of(group, tmp_path, layout)
    assert_nested(spans)
    for kind in ("forward", "backward"):
        found = Counter(
            (span["args"]["step"], span["args"]["stage"], span["args"]["micro_batch"])
            for span in spans
            if span["cat"] == kind
        )
        expected = {(s, stage, m) for s in STEPS for stage in range(num_stages) for m in range(4)}
        assert found == dict.fromkeys(expected, 1)
    assert {"data", "pipeline", "exchange", "clip", "optimizer", "save"} <= {span["cat"] for span in spans}
    assert {span["pid"] for span in spans if span["cat"] == "save"} == {0, 1}


def test_accumulated_micro_batches_and_their_collectives_are_recorded(group: Groups, tmp_path: Path) -> None:
    layout = {"data_parallel_replicate_degree": 2}
    spans = spans_of(group, tmp_path, layout, per_device_train_batch_size=16, cut_by_length=False)
    assert_nested(spans)
    per_rank = Counter((span["pid"], span["cat"]) for span in spans)
    for rank in (0, 1):
        assert per_rank[rank, "forward"] == per_rank[rank, "backward"] == 2 * len(STEPS)
        assert per_rank[rank, "optimizer"] == len(STEPS)
    reduced = [span for span in spans if span["cat"] == "collective"]
    assert {span["name"] for span in reduced} >= {"gloo:all_reduce"} and all(span["tid"] > 0 for span in reduced)


def test_a_run_that_ends_in_the_window_writes_the_steps_so_far(group: Groups, tmp_path: Path) -> None:
    config = make_config(layout=2, profile_steps=[2, 9], max_steps=9, stop_at_step=3)
    group(2).run(train, Job(config, str(tmp_path)))
    assert (tmp_path / "runs/tiny/r1/profile/steps-00000002-00000003.json").exists()
