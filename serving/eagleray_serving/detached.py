"""Servers that outlive the command that started them: starting, choosing and stopping one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil

from eagleray.errors import ServingError, UsageError
from eagleray_serving.front import choose_front
from eagleray_serving.home import Home, ServerRecord, find_process
from eagleray_serving.plan import ModelPlan
from eagleray_serving.protection import Protection
from eagleray_serving.server import Served, ServerOptions, access_log_path, require_resources, stop_there

POLL_S = 0.1
STOP_TIMEOUT_S = 60.0
TAIL_CHARACTERS = 2000


def start_detached(
    plans: Sequence[ModelPlan], options: ServerOptions, home: Home, arguments: Sequence[str]
) -> Served:
    """Start a server in a process of its own, and return once it answers.

    Args:
        plans: The models, for what can be checked before.
        options: Where it listens.
        home: Where it is recorded.
        arguments: The files, overrides and store of the call.

    Raises:
        ServingError: It does not start; the message is its own.
        ResourceError: This machine has less than the replicas ask for.
    """
    require_resources(plans)
    front = choose_front(options.host, options.port, options.edge.certificate)
    log = home.log_path(options.id)
    listen = ["--host", options.host, "--port", str(options.port), *options.edge.words]
    command = [sys.executable, "-m", "eagleray.cli", "serve", "up", *arguments, *listen, "--record", options.id]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,  # Ctrl-C and a closed terminal are not for it
        )
    try:
        record = _await(process, options, home, log)
    except BaseException:
        # Also when this command is interrupted: what it started must not stay behind half started.
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_S)
        process.kill()
        raise
    log_path = options.edge.log_path(access_log_path(home, options.id))
    shown = [replace(plan, protection=Protection(access_log=log_path)) for plan in plans]
    return Served(record, front.kind, tuple(shown), options.edge)


def _await(process: subprocess.Popen[bytes], options: ServerOptions, home: Home, log: Path) -> ServerRecord:
    deadline = time.monotonic() + options.ready_timeout_s
    while time.monotonic() < deadline:
        ended = process.poll() is not None
        record = home.read(options.id)
        if record is not None and record.state == "ready":
            return record
        if record is not None and record.error is not None:
            home.remove(record)
            raise ServingError(record.error["message"], record.error["hint"])
        if ended:
            raise ServingError(f"the server ended at its start:\n{_tail(log)}", f"its whole log: {log}")
        time.sleep(POLL_S)
    raise ServingError(f"the server did not answer within {options.ready_timeout_s:g} s", f"its log: {log}")


def choose(records: Sequence[ServerRecord], id: str | None, *, all: bool) -> list[ServerRecord]:
    """Return the servers that a call of `serve stop` means.

    Raises:
        UsageError: There is no such server, or several could be meant.
    """
    if all:
        return list(records)
    if id is not None:
        found = [record for record in records if record.id == id]
        if not found:
            running = ", ".join(record.id for record in records) or "none runs"
            raise UsageError(f"there is no server {id!r}", f"there are: {running}")
        return found
    if len(records) > 1:
        listed = ", ".join(f"{record.id} ({record.url})" for record in records)
        raise UsageError(f"{len(records)} servers run", f"name one, or --all: {listed}")
    return list(records)


def stop_server(home: Home, record: ServerRecord, *, verbose: bool = False) -> None:
    """Stop a server and wait until it is gone.

    Raises:
        ServingError: It is still there.
    """
    process = find_process(record)
    if process is None and record.address is not None:
        stop_there(record, verbose=verbose)
        home.remove(record)
        return
    if process is None:
        home.remove(record)
        return
    # A snapshot: once the head has ended, nothing tells any more whose its children were.
    family = [process, *process.children(recursive=True)]
    process.terminate()
    _, left = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for each in left:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    _, left = psutil.wait_procs(left, timeout=STOP_TIMEOUT_S)
    if left:
        raise ServingError(f"processes {[each.pid for each in left]} do not end", "ask the system why")
    home.remove(record)


def _tail(log: Path) -> str:
    try:
        return log.read_text(errors="replace")[-TAIL_CHARACTERS:].strip()
    except OSError:
        return ""
