"""What the user sees while a run goes on."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest

from eagleray_jobs.train.board import BoardState, Phase, Saved
from eagleray_jobs.train.failures import RankFailure
from eagleray_jobs.train.progress import Goal
from eagleray_jobs.train.report import TrainReport, next_commands
from eagleray_jobs.train.spec import MetricRecord
from eagleray_jobs.train.view import LiveView, PlainView, Snapshot, duration

GOAL = Goal("accuracy", greater_is_better=True)
RECORD = MetricRecord(
    step=10,
    epoch=0.5,
    loss=1.25,
    learning_rate=1e-3,
    grad_norm=0.5,
    examples_per_s=64.0,
    tokens_per_s=1280.0,
    memory_bytes=300 * 2**20,
)


def start() -> Snapshot:
    return Snapshot(max_steps=110, global_batch_size=64, phase="start Ray", since_s=100.0)


def test_each_phase_is_counted_until_the_next_begins_and_adds_up_over_restarts() -> None:
    snapshot = start().enter("train", 103.0).after(Phase("start workers", 1), 110.0, GOAL).enter("train", 112.0)
    snapshot = snapshot.enter("end", 115.0)
    assert snapshot.phases_s == {"start Ray": 3.0, "train": 10.0, "start workers": 2.0}
    assert snapshot.restarts == 1


def test_the_eta_follows_from_the_examples_per_second() -> None:
    assert start().eta_s() is None
    assert start().after(RECORD, 105.0, GOAL).eta_s() == pytest.approx(100.0)


def test_the_best_score_is_kept_with_its_step() -> None:
    snapshot = start()
    for step, accuracy in ((10, 0.5), (20, 0.9), (30, 0.7)):
        snapshot = snapshot.after(replace(RECORD, step=step, scores={"accuracy": accuracy}), 105.0, GOAL)
    assert snapshot.best == (0.9, 20)


def test_plain_lines_say_phases_commits_failed_saves_and_metrics_but_not_every_step() -> None:
    lines: list[str] = []
    view = PlainView(lines.append, clock=lambda: 5.0)
    snapshot = start()
    for event in (
        Phase("train"),
        RECORD,
        replace(RECORD, step=20),
        Saved(20, "m@r1-step-00000020"),
        Saved(30, None, "full"),
    ):
        snapshot = snapshot.after(event, 102.0, GOAL)
        view.show(snapshot, event)
    assert lines == [
        "train (start Ray took 2.0 s)",
        "step 10/110  ETA 1m40s  loss 1.2500  lr 0.001  tokens/s 1,280  memory 300 MiB",
        "committed m@r1-step-00000020",
        "save of step 30 failed: full",
    ]


def test_the_live_panel_shows_the_metrics_and_what_is_said_once_stays_above_it() -> None:
    stream = io.StringIO()
    with LiveView(stream, "langid") as view:
        view.note("taking over a dead run")
        view.show(start().after(RECORD, 105.0, GOAL), RECORD)
    shown = stream.getvalue()
    assert "langid" in shown and "10/110" in shown
    assert shown.index("taking over") < shown.index("10/110")


@pytest.mark.parametrize("seconds, text", [(0.4, "0s"), (59.6, "1m00s"), (185, "3m05s"), (7625, "2h07m")])
def test_durations_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_the_report_of_an_interrupted_run_is_the_command_that_continues() -> None:
    call = ("run.yaml", "train.seed=1")
    report = TrainReport(
        "m", "stopped", "m@r1-step-00000007", 7, 20, "/s", 2, next_commands=next_commands("m", "stopped", call)
    )
    assert report.text().splitlines()[0] == "m: stopped at step 7 of 20, committed"
    assert report.text().splitlines()[-1] == "  eagleray train run.yaml train.seed=1"
    assert report.as_json()["ref"] == "m@r1-step-00000007"


def test_the_board_gives_each_event_once_and_forgets_the_failures_of_an_earlier_attempt() -> None:
    board = BoardState()
    assert board.start(0) == 0
    board.post(Phase("train"))
    board.post(RECORD)
    assert [posted.event for posted in board.read(1)] == [RECORD]
    board.fail(RankFailure.of(0, ValueError("bad")))
    assert len(board.failures()) == 1
    assert board.start(0) == 1
    assert board.failures() == []
