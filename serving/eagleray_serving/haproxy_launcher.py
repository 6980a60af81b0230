"""Starts HAProxy for Ray Serve, with the settings that Serve has no key for.

Serve runs the executable that RAY_SERVE_HAPROXY_BINARY_PATH names, at its start and at each reload. Ours is this
script (`front.install_launcher` writes the shell stub around it): it edits the file that Serve has just written,
asks the kernel to end HAProxy together with the process that started it, and becomes HAProxy. Standard library
only: it runs with `python -I -S`, on the way of every reload.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from pathlib import Path

PR_SET_PDEATHSIG = 1
# A client that may name its request freely can crash Serve (invalid UTF-8 is a 500 there), and one that may set
# Serve's own headers can switch off its limits.
FRONTEND_RULES = (
    "http-request del-header x-request-id unless { req.hdr(x-request-id) -m reg ^[A-Za-z0-9._:-]{1,128}$ }",
    "http-request del-header x-request-timeout-seconds",
    "http-request del-header x-request-disconnect-disabled",
    "http-request del-header serve_multiplexed_model_id",
    "http-request del-header serve-multiplexed-model-id",
)
ERROR_STATUSES = (400, 408, 502, 503, 504)


class UnknownConfigError(Exception):
    """Ray writes another file than the one that these edits were made for."""


def rewrite(config: str, errors_dir: str, request_timeout_s: int) -> str:
    """Edit a configuration that Serve wrote.

    - Statistics and metrics listen on loopback only.
    - A request is sent on once it is here as a whole, so that it can be sent again when a replica dies.
    - A body that does not arrive in time, and every error of HAProxy's own, has our error shape.

    Args:
        config: What Serve wrote.
        errors_dir: Folder of the answers `<status>.http`.
        request_timeout_s: Seconds in which a request must arrive.

    Raises:
        UnknownConfigError: A line that is to be edited is not there exactly as expected.
    """
    lines = config.splitlines()
    if any("option http-buffer-request" in line for line in lines):
        return config
    _replace(lines, "bind :", "bind 127.0.0.1:")
    _replace(lines, "bind *:", "bind 127.0.0.1:", after="listen stats")
    lines = [line for line in lines if not line.strip().startswith("errorfile ")]
    errors = [f"errorfile {status} {errors_dir}/{status}.http" for status in ERROR_STATUSES]
    _insert(
        lines,
        "option abortonclose",
        ["option http-buffer-request", f"timeout http-request {request_timeout_s}s", *errors],
    )
    _insert(lines, "bind ", list(FRONTEND_RULES), after="frontend http_frontend")
    return "\n".join(lines) + "\n"


def _find(lines: list[str], start: str, after: str | None) -> int:
    begin = 0 if after is None else _find(lines, after, None) + 1
    for number, line in enumerate(lines[begin:], begin):
        if line.strip().startswith(start):
            return number
    raise UnknownConfigError(f"no line starts with {start!r}" + (f" after {after!r}" if after else ""))


def _replace(lines: list[str], old: str, new: str, after: str | None = None) -> None:
    number = _find(lines, old, after)
    lines[number] = lines[number].replace(old, new, 1)


def _insert(lines: list[str], anchor: str, new: list[str], after: str | None = None) -> None:
    number = _find(lines, anchor, after)
    lines[number + 1 : number + 1] = ["    " + line for line in new]


def die_with_parent() -> None:
    """Let the kernel send SIGKILL to this process, and to what it becomes, when its parent ends."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        sys.exit("haproxy_launcher: the parent has ended already")


def main(arguments: list[str]) -> None:
    """Edit the file after `-f` and become HAProxy."""
    binary, errors_dir, request_timeout_s, *rest = arguments
    die_with_parent()
    path = Path(rest[rest.index("-f") + 1])
    path.write_text(rewrite(path.read_text(), errors_dir, int(request_timeout_s)))
    os.execv(binary, [binary, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
