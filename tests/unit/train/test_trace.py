"""The timelines of ranks as a file for chrome://tracing, as a picture, and as a bubble."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from eagleray.parallel.timeline import Kind, Span, Timeline
from eagleray.store.objects import ObjectStore
from eagleray_jobs.train.profile import profiled_steps
from eagleray_jobs.train.profiles import find_profiles, write_profile
from eagleray_jobs.train.trace import RankTimeline, bubble, bubbles, chrome_trace, ideal_bubble, picture

MS = 1_000_000


def passes(*moments: tuple[Kind, int, int], stage: int = 0) -> list[Span]:
    """Make the passes of one step, given in milliseconds, numbered as micro-batches of their kind."""
    numbers: dict[Kind, int] = {}
    spans = []
    for kind, start, end in moments:
        numbers[kind] = numbers.get(kind, -1) + 1
        spans.append(Span(kind, 6, start * MS, end * MS, micro_batch=numbers[kind], stage=stage))
    return spans


# 1F1B of two stages and two micro-batches, forward 1 ms and backward 2 ms: one slot of each rank is empty.
FIRST = passes(("forward", 0, 1), ("forward", 1, 2), ("backward", 4, 6), ("backward", 7, 9))
SECOND = passes(("forward", 1, 2), ("backward", 2, 4), ("forward", 4, 5), ("backward", 5, 7), stage=1)


def test_the_bubble_is_what_the_ranks_do_not_compute() -> None:
    assert bubble([FIRST, SECOND]) == pytest.approx(1 - 12 / 18)
    assert bubble([FIRST, SECOND]) == pytest.approx(ideal_bubble(2, 2))
    assert bubble([passes(("forward", 3, 4), ("backward", 4, 6))]) == 0


def test_each_pipeline_has_a_bubble_of_its_own_and_other_layouts_have_none() -> None:
    slow = [replace(span, start_ns=2 * span.start_ns, end_ns=2 * span.end_ns) for span in SECOND]
    ranks = [
        RankTimeline(0, "pp 0, tp 0", FIRST),
        RankTimeline(1, "pp 0, tp 1", FIRST),
        RankTimeline(2, "pp 1, tp 0", SECOND),
        RankTimeline(3, "pp 1, tp 1", slow),
    ]
    found, ideal = bubbles(ranks) or (0.0, 0.0)
    assert ideal == pytest.approx(1 / 3)
    assert found == pytest.approx((bubble([FIRST, SECOND]) + bubble([FIRST, slow])) / 2)
    assert bubbles([RankTimeline(0, "dp 0", FIRST), RankTimeline(1, "", SECOND)]) is None


def test_the_ideal_bubble_shrinks_with_micro_batches_and_stages() -> None:
    assert ideal_bubble(1, 4) == 0
    assert ideal_bubble(4, 4) == pytest.approx(3 / 7)
    assert ideal_bubble(4, 4, stages_per_rank=2) == pytest.approx(3 / 11)


def test_a_trace_has_a_process_for_each_rank_and_times_from_zero() -> None:
    collective = Span("collective", 6, 2 * MS, 3 * MS, name="gloo:all_reduce", lane=2)
    trace = json.loads(chrome_trace([rank(0, [*FIRST, collective]), rank(1, SECOND)], {"layout": "pp2"}))
    named = {e["pid"]: e["args"]["name"] for e in trace["traceEvents"] if e["name"] == "process_name"}
    assert named == {0: "rank 0 (pp 0)", 1: "rank 1 (pp 1)"}
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert min(event["ts"] for event in spans) == 0
    (found,) = (event for event in spans if event["cat"] == "collective")
    assert (found["name"], found["ts"], found["dur"], found["tid"]) == ("gloo:all_reduce", 2e3, 1e3, 2)
    backward = next(event for event in spans if event["cat"] == "backward")
    assert backward["name"] == "backward of micro-batch 0 on stage 0"
    assert backward["args"] == {"step": 6, "micro_batch": 0, "stage": 0}
    assert trace["otherData"] == {"layout": "pp2"}


def test_a_picture_is_xml_with_a_row_for_each_rank_and_a_box_for_each_pass() -> None:
    hostile = RankTimeline(1, "<pp 1>", SECOND)
    svg = ElementTree.fromstring(picture([rank(0, FIRST), hostile], "en-fr@r1 & <others>"))
    space = "{http://www.w3.org/2000/svg}"
    texts = ["".join(each.itertext()) for each in svg.iter(f"{space}text")]
    assert "rank 0 pp 0" in texts and "rank 1 <pp 1>" in texts and "en-fr@r1 & <others>" in texts
    titles = [each.text for each in svg.iter(f"{space}title")]
    assert len(titles) == len(FIRST) + len(SECOND)
    assert "forward of micro-batch 1 on stage 0, 1.00 ms" in titles


@pytest.mark.parametrize("where", ["a directory", "S3"])
def test_a_profile_lies_in_the_runs_folder_of_any_store(tmp_path: Path, s3_bucket: str, where: str) -> None:
    store = ObjectStore.open(str(tmp_path) if where == "a directory" else f"{s3_bucket}/profiles")
    about = {"run": "en-fr@r1", "layout": "pp2"}
    for first in (100, 6):
        write_profile(store, "runs/en-fr/r1", about, [rank(0, FIRST), rank(1, SECOND)], range(first, first + 3))
    names = find_profiles(store, "runs/en-fr/r1")
    assert names == tuple(
        f"runs/en-fr/r1/profile/steps-{steps}.{kind}"
        for steps in ("00000006-00000008", "00000100-00000102")
        for kind in ("json", "svg")
    )
    found = json.loads(store.get(names[0]))["otherData"]
    assert (found.pop("bubble"), found.pop("ideal_bubble")) == pytest.approx((1 / 3, 1 / 3))
    assert found == about | {"first_step": 6, "last_step": 8}
    assert "bubble of the pipeline 33.3%" in "".join(ElementTree.fromstring(store.get(names[1])).itertext())


@pytest.mark.parametrize(
    "given, start, max_steps, expected",
    [
        (None, 0, 100, [6, 7, 8]),
        (None, 40, 100, [46, 47, 48]),
        (None, 0, 4, [2, 3, 4]),
        (None, 0, 1, [1]),
        (None, 99, 100, [100]),
        ([10, 12], 0, 100, [10, 11, 12]),
        ([10, 12], 10, 100, [11, 12]),
        ([10, 12], 20, 100, []),
        ([10, 12], 0, 10, [10]),
    ],
)
def test_which_steps_are_recorded(
    given: list[int] | None, start: int, max_steps: int, expected: list[int]
) -> None:
    assert list(profiled_steps(given, start, max_steps)) == expected


def test_a_timeline_records_only_while_it_is_on() -> None:
    timeline = Timeline()
    with timeline.span("forward"):
        pass
    timeline.start(3)
    with timeline.span("step"), timeline.span("forward", micro_batch=1):
        pass
    timeline.stop()
    with timeline.span("backward"):
        pass
    inner, outer = timeline.take()
    assert (inner.kind, inner.step, inner.micro_batch) == ("forward", 3, 1)
    assert outer.kind == "step" and outer.start_ns <= inner.start_ns <= inner.end_ns <= outer.end_ns
    assert timeline.take() == []


def rank(number: int, spans: list[Span]) -> RankTimeline:
    return RankTimeline(number, f"pp {number}", spans)
