"""What runs in a job: the verb, between the two records that say that it started and how it ended."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import eagleray
from eagleray import __version__, cli
from eagleray.errors import EaglerayError
from eagleray.store.objects import ObjectStore
from eagleray_jobs.submit.records import EXIT_OUTCOMES, JobEnd, JobRecords

MAX_LOG_BYTES = 1024 * 1024


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a verb as a job and exit with its status."""
    parser = argparse.ArgumentParser(prog="eagleray-job")
    parser.add_argument("--store", required=True)
    parser.add_argument("--id", required=True)
    parser.add_argument("verb", nargs="+")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _exit_in_order)
    records = JobRecords(ObjectStore.open(options.store))
    records.start(options.id, _where())
    status, found = run_verb(options.verb)
    if found is not None:
        print(json.dumps(found), flush=True)
    try:
        records.put_log(options.id, log_tail())
        records.finish(options.id, end_of(status, found))
    except EaglerayError:
        traceback.print_exc()  # the verb's own status says more than that its record could not be written
    sys.exit(status)


def _where() -> dict[str, Any]:
    """Say what runs where, without importing any of it."""
    ray = find_spec("ray")
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "python": sys.executable,
        "ray": ray.origin if ray is not None else None,
        "eagleray": __version__,
        "package": eagleray.__file__,
    }


def run_verb(arguments: Sequence[str]) -> tuple[int, dict[str, Any] | None]:
    """Run a verb with `--json`; return its exit status and the object that it printed."""
    sys.stdout.flush()
    stdout = os.dup(1)
    with tempfile.TemporaryFile("w+", encoding="utf-8") as result:
        os.dup2(result.fileno(), 1)
        try:
            cli.main([*arguments, "--json"])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        finally:
            sys.stdout.flush()
            os.dup2(stdout, 1)
            os.close(stdout)
        result.seek(0)
        return status, _last_object(result.read())


def end_of(status: int, found: dict[str, Any] | None) -> JobEnd:
    """Say how a job ended, from its exit status and what it printed."""
    outcome = EXIT_OUTCOMES.get(status, "failed")
    error = (found or {}).get("error")
    if isinstance(error, dict):
        return JobEnd(outcome, status, error.get("message"), error.get("hint"))
    return JobEnd(outcome, status, result=found)


def log_tail(limit: int = MAX_LOG_BYTES) -> bytes:
    """Return the end of this process's own log: Ray points standard error at a file."""
    path = Path("/proc/self/fd/2")
    try:
        if not path.is_file():
            return b""
        with path.open("rb") as stream:
            stream.seek(max(0, path.stat().st_size - limit))
            return stream.read()
    except OSError:
        return b""  # not on this system; the record tells the rest


def _last_object(text: str) -> dict[str, Any] | None:
    lines = text.strip().splitlines()
    try:
        found = json.loads(lines[-1]) if lines else None
    except ValueError:
        return None
    return found if isinstance(found, dict) else None


def _exit_in_order(signal_number: int, _: object) -> NoReturn:
    sys.exit(128 + signal_number)


if __name__ == "__main__":
    main()
