"""`eagleray train --profile` on Ray, with a shipped pipeline cut short."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

import pytest
from ray_cluster import RayCluster
from train_runs import CommandLine

PIPELINE = Path(__file__).parents[2] / "configs" / "en-fr-pipeline.yaml"
SHORT = ("train.max_steps=9", "train.eval_steps=9", "train.save_steps=9", "train.max_eval_examples=16")


@pytest.mark.slow
def test_a_profiled_run_leaves_a_trace_and_a_picture_of_all_workers_in_its_folder(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    done = command_line.run(
        "train", PIPELINE, *SHORT, "--profile", "--address", ray_cluster.address, "--store", store
    )
    assert (done.status, done.value.get("outcome")) == (0, "finished"), done.stderr
    trace, drawing = sorted((store / "runs/en-fr-pipeline/r1/profile").iterdir())
    assert [trace.name, drawing.name] == [f"steps-00000006-00000008.{kind}" for kind in ("json", "svg")]
    assert done.value["profiles"] == [str(path.relative_to(store)) for path in (trace, drawing)]
    found = json.loads(trace.read_bytes())
    about = found["otherData"]
    assert (about["run"], about["layout"]) == ("en-fr-pipeline@r1", "pp2.ddp2")
    assert 0 < about["ideal_bubble"] < 1 and 0 < about["bubble"] < 1
    spans = [event for event in found["traceEvents"] if event["ph"] == "X"]
    forward = Counter(
        (e["pid"], e["args"]["step"], e["args"]["micro_batch"]) for e in spans if e["cat"] == "forward"
    )
    num_micro_batches = len({micro_batch for _, _, micro_batch in forward})
    assert num_micro_batches > 1
    assert forward == dict.fromkeys(
        ((rank, step, number) for rank in range(4) for step in (6, 7, 8) for number in range(num_micro_batches)), 1
    )
    assert {e["pid"] for e in spans if e["cat"] == "collective"} == {0, 1, 2, 3}
    picture = ElementTree.fromstring(drawing.read_text())
    texts = ["".join(each.itertext()) for each in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "rank 3 pp 1, dp 1" in texts and "bubble of the pipeline" in texts[0]
