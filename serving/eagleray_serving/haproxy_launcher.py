"""Starts HAProxy for Ray Serve, with the settings that Serve has no key for.

Serve runs the executable that RAY_SERVE_HAPROXY_BINARY_PATH names, at its start and at each reload. Ours is this
script (`front.install_launcher` writes the shell stub around it): it edits the file that Serve has just written,
asks the kernel to end HAProxy together with the process that started it, and becomes HAProxy. Standard library
only: it runs with `python -I -S`, on the way of every reload.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

PR_SET_PDEATHSIG = 1
LOOPBACK = "127.0.0.1"
ALL_INTERFACES = ("0.0.0.0", "::")
REQUEST_ID = "[A-Za-z0-9._:/+=-]{1,128}"
# HAProxy's own errors, and what the rules below refuse.
ERROR_STATUSES = (400, 408, 500, 502, 503, 504)
REFUSED_STATUSES = (404, 405, 414, 431)
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
# Lines; HAProxy's own limit of 101 would be a 400 in its own words, where ours of bytes is a 431.
MAX_HEADERS = 32_767
# A body that may not fit the front's buffer (262,144 bytes, headers included): it could not be sent again.
LARGE_BODY_BYTES = 200_000
# Bodies like that, and answers in lines, are the edge application's: it outlives the replicas that it asks.
EDGE_RULES = (
    "acl is_large req.hdr_val(content-length) gt {large}",
    "acl wants_lines req.hdr(accept) -i -m sub application/x-ndjson",
    "use_backend {edge} if METH_POST is_large",
    "use_backend {edge} if METH_POST wants_lines",
)


class UnknownConfigError(Exception):
    """Ray writes another file than the one that these edits were made for."""


class Settings(NamedTuple):
    """What Serve has no key for; written beside the stub as JSON.

    Attributes:
        binary: HAProxy.
        errors_dir: Folder of the answers `<status>.http` and of the bodies `<status>.json`.
        request_timeout_s: Seconds in which a request must arrive.
        max_header_bytes: Largest request line and headers.
        bulk_timeout_s: Seconds that the application at `/` may be silent.
        pem: Certificate and private key in one file, where the front speaks TLS.
        host: Address that the front listens on. Serve knows of loopback alone: it would open the ports of its
            replicas on the same address.
    """

    binary: str
    errors_dir: str
    request_timeout_s: int
    max_header_bytes: int
    bulk_timeout_s: int
    pem: str | None = None
    host: str = LOOPBACK


def frontend_rules(settings: Settings) -> list[str]:
    """Return what is done with a request before it is routed."""
    refusals = {
        404: "path -i /-/routes",
        414: f"url_len gt {settings.max_header_bytes}",
        431: f"req.hdrs,length gt {settings.max_header_bytes}",
    }
    return [
        # A client that may name its request freely can crash Serve (invalid UTF-8 is a 500 there), and one that
        # may set Serve's own headers can switch off its limits.
        f"http-request del-header x-request-id unless {{ req.hdr(x-request-id) -m reg ^{REQUEST_ID}$ }}",
        "http-request del-header x-request-timeout-seconds",
        "http-request del-header x-request-disconnect-disabled",
        "http-request del-header serve_multiplexed_model_id",
        "http-request del-header serve-multiplexed-model-id",
        # The id is made here, so that a request that is sent again keeps it, and an error of HAProxy's own has it.
        "http-request set-header x-request-id %[uuid] unless { req.hdr(x-request-id) -m found }",
        "http-request set-var(txn.eagleray_id) req.hdr(x-request-id)",
        "http-after-response set-header x-request-id %[var(txn.eagleray_id)]",
        "http-after-response set-header x-request-id %[uuid] unless { var(txn.eagleray_id) -m found }",
        # What the server behind knows no answer to in our shape: other protocols and methods.
        "http-request del-header upgrade",
        f"http-request return status 405 content-type application/json file {settings.errors_dir}/405.json"
        f' hdr allow "{", ".join(METHODS)}" unless {{ method {" ".join(METHODS)} }}',
        "http-request set-header x-forwarded-for %[src]",
        *(
            f"http-request return status {status} content-type application/json"
            f" file {settings.errors_dir}/{status}.json if {{ {condition} }}"
            for status, condition in refusals.items()
        ),
    ]


def rewrite(config: str, settings: Settings) -> str:
    """Edit a configuration that Serve wrote.

    - Statistics and metrics listen on loopback only, the front on the server's address, where it may speak TLS.
    - A request is sent on once it is here as a whole, so that it can be sent again when a replica dies.
    - A request that is too large for that goes to the application at `/`, which takes its time.
    - Every answer names its request; what is too large or too late, and every error that HAProxy has a file for,
      has our error shape.

    Args:
        config: What Serve wrote.
        settings: What it did not.

    Raises:
        UnknownConfigError: A line that is to be edited is not there exactly as expected.
    """
    lines = config.splitlines()
    if any("option http-buffer-request" in line for line in lines):
        return config
    _replace(lines, "bind :", "bind 127.0.0.1:")
    _replace(lines, "bind *:", "bind 127.0.0.1:", after="listen stats")
    lines = [line for line in lines if not line.strip().startswith("errorfile ")]
    errors = [f"errorfile {status} {settings.errors_dir}/{status}.http" for status in ERROR_STATUSES]
    _insert(
        lines,
        "option abortonclose",
        ["option http-buffer-request", f"timeout http-request {settings.request_timeout_s}s", *errors],
    )
    _open(lines, settings)
    _insert(lines, "bind ", frontend_rules(settings), after="frontend http_frontend")
    _insert(lines, "maxconn ", [f"tune.http.maxhdr {MAX_HEADERS}"], after="global")
    _send_large_requests(lines, settings.bulk_timeout_s)
    return "\n".join(lines) + "\n"


def _open(lines: list[str], settings: Settings) -> None:
    """Let the front listen where it is to, and always on loopback, where Serve looks for it."""
    number = _find(lines, f"bind {LOOPBACK}:", "frontend http_frontend")
    port = lines[number].rpartition(":")[2]
    own = f"[{settings.host}]" if ":" in settings.host else settings.host
    is_on_loopback = settings.host in (LOOPBACK, "localhost", *ALL_INTERFACES)
    addresses = [own] if is_on_loopback else [LOOPBACK, own]
    both = " v4v6" if settings.host == "::" else ""
    tls = "" if settings.pem is None else f" ssl crt {settings.pem} ssl-min-ver TLSv1.2 alpn http/1.1"
    lines[number : number + 1] = [f"    bind {address}:{port}{both}{tls}" for address in addresses]


def _send_large_requests(lines: list[str], bulk_timeout_s: int) -> None:
    words = [line.split() for line in lines]
    edges = [each[1].removeprefix("is_") for each in words if each[:1] == ["acl"] and each[2:] == ["path", "/"]]
    if not edges:
        return  # it is not there yet; Serve writes the file again when it is
    _insert(lines, f"backend {edges[0]}", [f"timeout server {bulk_timeout_s}s"])
    first = _find(lines, "use_backend ", None)
    rules = [rule.format(edge=edges[0], large=LARGE_BODY_BYTES) for rule in EDGE_RULES]
    lines[first:first] = ["    " + rule for rule in rules]


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
    settings_path, *rest = arguments
    die_with_parent()
    settings = Settings(**json.loads(Path(settings_path).read_text()))
    path = Path(rest[rest.index("-f") + 1])
    path.write_text(rewrite(path.read_text(), settings))
    os.execv(settings.binary, [settings.binary, *rest])


if __name__ == "__main__":
    main(sys.argv[1:])
