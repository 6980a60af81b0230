"""Outlives a server by seconds: ends what is left of its processes, however it ended.

Most of Ray's processes and HAProxy end with the process that started them. Ray's agents find out by themselves,
seconds later, and then first report the raylet's death to a GCS that died with it. The watchdog is a process
beside the server that remembers its descendants; when the server is gone, it kills those of them that still run
and removes the server's folder. It runs as a script, with the standard library and psutil alone.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

POLL_S = 1.0
END_TIMEOUT_S = 10.0


@contextmanager
def watched(folder: Path) -> Iterator[None]:
    """Have this process watched; what it started and did not end itself is ended at the end of the context."""
    words = [sys.executable, "-I", str(Path(__file__)), str(os.getpid()), str(folder)]
    # In a session of its own: Ctrl-C, or a signal to the whole group, is not for it.
    watchdog = subprocess.Popen(words, stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        assert watchdog.stdin is not None
        watchdog.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            watchdog.wait(2 * END_TIMEOUT_S)


def look(server: psutil.Process, known: set[psutil.Process]) -> set[psutil.Process]:
    """Return the processes that a server has started and that run; once it is gone, those of the known ones."""
    # psutil's processes are equal where pid and start time are: a pid that is used again is another process.
    found = {process for process in known if process.is_running()}
    with suppress(psutil.NoSuchProcess):
        found.update(server.children(recursive=True))
    return found - {psutil.Process()}


def is_alive(process: psutil.Process) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def end(processes: set[psutil.Process]) -> None:
    """Kill processes and what they have started."""
    for process in list(processes):
        with suppress(psutil.NoSuchProcess):
            processes.update(process.children(recursive=True))
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(processes, timeout=END_TIMEOUT_S)  # before their folder is removed


def main(pid: int, folder: Path) -> None:
    """Watch the process that started this one, until it is gone or closes our standard input."""
    if os.getppid() == pid:
        server = psutil.Process(pid)
        started = look(server, set())
        while is_alive(server) and not select.select([sys.stdin], [], [], POLL_S)[0]:
            started = look(server, started)
        end(look(server, started))
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
