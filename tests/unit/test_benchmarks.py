"""What benchmarks compute and write; measuring itself is not a test."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import yaml
from http_load import Loaded
from results_page import markdown_table, replace_section, write_section
from serving import require_right, require_whole
from serving_results import BulkRun, Replicas, ScaledUp, report_bulk, report_requests, report_scaling
from serving_setup import commit, noop_file
from training_results import (
    ONE,
    OURS,
    SAVING,
    SIDES,
    TWO,
    Plan,
    Run,
    logged_steps_per_s,
    make_config,
    report,
)

from eagleray.config.schema import RunConfig
from eagleray.engine.engine import load_engine
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry

DOCUMENT = """# Title
<!-- training:begin -->
old
<!-- training:end -->
between
<!-- serving:begin -->
not measured yet
<!-- serving:end -->
end
"""
ROOT = Path(__file__).parents[2]
BENCHMARKS_PAGE = ROOT / "docs" / "benchmarks.md"


def test_a_section_is_replaced_and_nothing_else_changes() -> None:
    assert replace_section(DOCUMENT, "training", "\nnew\nlines\n\n") == DOCUMENT.replace("old", "new\nlines")


def test_a_section_can_be_replaced_again_and_again() -> None:
    once = replace_section(DOCUMENT, "serving", "| 1 |")
    assert replace_section(once, "serving", "not measured yet") == DOCUMENT


@pytest.mark.parametrize(
    "document",
    [
        "",
        "<!-- training:begin -->",
        "<!-- training:end --> <!-- training:begin -->",
        "<!-- training:begin --> <!-- training:end --> <!-- training:end -->",
    ],
)
def test_a_document_without_its_marks_is_refused(document: str) -> None:
    with pytest.raises(ValueError, match="training:begin"):
        replace_section(document, "training", "new")


@pytest.mark.parametrize(
    "name", ["training", "layouts", "memory", "recomputation", "bubble", "serving", "bulk", "scaling"]
)
def test_the_page_has_a_section_for_every_benchmark(name: str, tmp_path: Path) -> None:
    copy = tmp_path / "benchmarks.md"
    copy.write_text(BENCHMARKS_PAGE.read_text())
    write_section(copy, name, "measured on another machine")
    assert f"<!-- {name}:begin -->\nmeasured on another machine\n" in copy.read_text()


def test_a_table_is_markdown() -> None:
    table = markdown_table(["what", "steps/s"], [["ours", "9.5"], ["theirs", "10.25"]])
    assert table.splitlines() == [
        "| what   | steps/s |",
        "| ------ | ------: |",
        "| ours   |     9.5 |",
        "| theirs |   10.25 |",
    ]


def test_the_speed_of_a_run_is_read_from_its_records_without_the_first_steps() -> None:
    slow, fast = {"step": 10, "examples_per_s": 1.0}, {"step": 30, "examples_per_s": 640.0}
    faster = {"step": 50, "examples_per_s": 320.0}  # 20 steps in 2 s, then 20 in 4 s
    assert logged_steps_per_s([slow, fast, faster], num_skipped=10, batch_size=64) == pytest.approx(40 / 6)


def test_sides_differ_in_workers_and_saves_alone(tmp_path: Path) -> None:
    shipped = yaml.safe_load((ROOT / "configs" / "en-fr.yaml").read_text())
    ours, saving, two, one = (
        make_config(shipped, side, Plan(), "a", tmp_path) for side in (OURS, SAVING, TWO, ONE)
    )
    for config in (ours, saving, two, one):
        assert RunConfig.model_validate(config).model_dump()["model"]["config"] == shipped["model"]["config"]
    assert saving == {**ours, "train": {**ours["train"], "save_steps": 50}}
    assert ours["train"]["global_batch_size"] == 2 * ours["train"]["per_device_train_batch_size"]
    assert one == {
        **two,
        "train": {**two["train"], "global_batch_size": two["train"]["per_device_train_batch_size"]},
        "parallel": {"data_parallel_replicate_degree": 1},
    }


def test_ratios_are_of_one_round_each_and_costs_of_what_saves_take_away() -> None:
    phases = dict.fromkeys(
        ("claim", "start Ray", "prepare data", "start workers", "load model", "first step"), 1.0
    )
    runs = {side: [Run(speed, 10.0, phases) for speed in (5.0, 10.0, 20.0)] for side in SIDES}
    runs[SAVING] = [Run(0.98 * speed, 10.0, phases) for speed in (5.0, 10.0, 20.0)]
    runs[ONE] = [Run(speed, 10.0, phases) for speed in (5.0, 12.5, 25.0)]
    text = report(runs, Plan(), "a machine")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    assert ["every 50 steps", "9.80", "4.90 to 19.60", "2.0%", "< 3%"] in rows
    assert ["eagleray train", "1600", "2560", "1.60", ">= 1.85"] in rows
    assert ["start Python, import, read the file", "4.0", "4.0", "", ""] in rows


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]


def test_the_way_of_a_request_is_compared_round_by_round() -> None:
    one = Loaded(300, 2.5, 4.0, 0)
    runs = {
        "eagleray serve": [(Loaded(speed, 8.0, 20.0, 0), one) for speed in (1500.0, 3000.0)],
        "Ray Serve as documented": [(Loaded(speed, 80.0, 200.0, 1), one) for speed in (300.0, 300.0)],
    }
    text = report_requests(runs, 2, 6, "a machine", "wrk")
    assert ["eagleray serve", "2,250", "1,500 to 3,000", "20.0", "2.50", "0", "", ">= 1,500"] in cells(text)
    pattern = ["Ray Serve as documented", "300", "300 to 300", "200.0", "2.50", "2", "7.50", "ours >= 5 times"]
    assert pattern in cells(text)
    assert "LitServe is not installed" in text


def test_replicas_and_small_requests_beside_a_large_one_have_their_targets() -> None:
    rest = [float(value) for value in range(1, 101)]
    beside = [2 * value for value in rest]
    runs = {
        # The machine is twice as fast in the second round, which is not the second replica's doing.
        Replicas("auto", 1): [
            BulkRun(100.0, rest, rest, 50.0),
            BulkRun(200.0, rest, rest, 50.0),
            BulkRun(100.0, rest, rest, 50.0),
        ],
        Replicas("auto", 2): [
            BulkRun(190.0, rest, beside, 60.0),
            BulkRun(360.0, rest, beside, 60.0),
            BulkRun(400.0, rest, beside, 60.0),
        ],
    }
    text = report_bulk(runs, 3000, "a machine")
    assert ["2 replicas", "360", "190 to 400", "1.90", ">= 1.85"] in cells(text)
    assert ["2 replicas", "100", "60", "102", "200", "< 260"] in cells(text)


def test_a_second_replica_has_its_targets() -> None:
    text = report_scaling([ScaledUp(2.0, 9.0), ScaledUp(4.0, 8.0), ScaledUp(3.0, 12.0)], "a machine")
    assert ["until it is wanted", "3.0", "2.0 to 4.0", "<= 5"] in cells(text)
    assert ["from then until it has answered", "9.0", "8.0 to 12.0", "<= 20"] in cells(text)


FAILED_ITEM = {"error": {"code": "model_failed", "message": "the model failed on this item", "hint": None}}


@pytest.mark.parametrize(
    ("status", "predictions"),
    [(200, [FAILED_ITEM]), (200, []), (200, [{"value": 2.5}]), (503, [{"value": 1.5}])],
)
def test_a_side_that_does_not_answer_right_is_not_timed(status: int, predictions: list[object]) -> None:
    require_right("LitServe", httpx.Response(200, json={"predictions": [{"value": 1.5}]}))
    with pytest.raises(RuntimeError, match=f"LitServe answers {status}"):
        require_right("LitServe", httpx.Response(status, json={"predictions": predictions}))


@pytest.mark.parametrize(("items", "said"), [(["un"], "1 of 2 items"), (["un", FAILED_ITEM], "1 failed")])
def test_a_large_answer_with_a_gap_is_not_timed(items: list[object], said: str) -> None:
    def answer(items: list[object]) -> httpx.Response:
        asked = httpx.Request("POST", "http://127.0.0.1/v1/translate")
        return httpx.Response(200, json={"translations": items}, request=asked)

    require_whole(answer(["un", "deux"]), 2)
    with pytest.raises(RuntimeError, match=said):
        require_whole(answer(items), 2)


def test_the_model_that_does_nothing_gives_back_what_it_is_asked(tmp_path: Path) -> None:
    path = commit(noop_file(), tmp_path)
    store = ObjectStore.open(yaml.safe_load(path.read_text())["store"])
    engine = load_engine(Registry(store).open("noop"))
    assert engine.answer([{"value": 1.5}, {"value": -2}]) == [{"value": 1.5}, {"value": -2.0}]
