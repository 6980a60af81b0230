"""The board: a small process, since it starts while the workers do."""

from __future__ import annotations

import subprocess
import sys


def test_what_is_posted_is_read_without_torch() -> None:
    code = "import sys, eagleray_jobs.train.board; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["False"]
