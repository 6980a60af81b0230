"""What Ray says goes to a file, not to the user's terminal."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from eagleray.telemetry import RayLog


def test_what_ray_prints_and_logs_is_in_the_file_until_it_is_restored(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private import worker

    before = worker.print_to_stdstream
    log = RayLog(tmp_path / "ray.log")
    log.divert()
    try:
        # As Ray itself does when a raylet has died.
        worker.print_to_stdstream(
            {"lines": ["Raylet is terminated."], "pid": "raylet", "is_err": False}, ignore_prefix=False
        )
        logging.getLogger("ray.data").warning("spilling")
        log.divert()  # once more, after a library brought a handler
    finally:
        log.restore()
    assert worker.print_to_stdstream is before
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")
    text = (tmp_path / "ray.log").read_text()
    assert "(raylet) Raylet is terminated." in text and "spilling" in text
