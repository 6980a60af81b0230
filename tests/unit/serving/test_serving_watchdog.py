"""What a server that ended leaves behind, and who ends it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from eagleray_serving.watchdog import end, is_alive, look

# A server whose child, as Ray's agents, does not mind that its parent is gone.
SERVER = """
import subprocess, sys, time
from pathlib import Path
from eagleray_serving.watchdog import watched
with watched(Path(sys.argv[1])):
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]).pid, flush=True)
    sys.stdin.readline()
print("ended", flush=True)
time.sleep(600)
"""


@contextmanager
def server(folder: Path) -> Iterator[tuple[subprocess.Popen[str], psutil.Process]]:
    """A server and its child."""
    words = [sys.executable, "-c", SERVER, str(folder)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, psutil.Process(int(process.stdout.readline()))
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_server_has_started_is_remembered_and_ended(tmp_path: Path) -> None:
    with server(tmp_path) as (process, child):
        watched = psutil.Process(process.pid)
        started = look(watched, set())
        assert child in started and psutil.Process() not in started
        process.kill()
        process.wait(30)
        assert not is_alive(watched)
        left = look(watched, started)
        assert child in left, "nothing tells of it any more that it was the server's"
        end(left)
        assert not is_alive(child)


def test_the_watchdog_ends_what_is_left_at_the_end_of_the_context(tmp_path: Path) -> None:
    folder = tmp_path / "server"
    folder.mkdir()
    with server(folder) as (process, child):
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "ended\n"
        assert not is_alive(child)
        assert (process.poll(), folder.exists()) == (None, False)


def test_a_watchdog_that_comes_too_late_watches_nobody(tmp_path: Path) -> None:
    """Its parent is gone: the process that adopted it is no server."""
    from eagleray_serving import watchdog

    late = subprocess.run(
        [sys.executable, "-I", watchdog.__file__, str(os.getppid()), str(tmp_path / "x")], timeout=60
    )
    assert late.returncode == 0
