"""Requests per second of a URL: wrk where it is installed, else a client of our own; in its own process."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

SCRIPT = """wrk.method = "POST"
wrk.headers["content-type"] = "application/json"
wrk.body = [==[{body}]==]
done = function(summary, latency, requests)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format("RESULT %d %d %d %d %d\\n", summary.requests, summary.duration, failed,
    latency:percentile(50), latency:percentile(99)))
end
"""


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a load measured.

    Attributes:
        requests_per_s: Answers with status 200 per second.
        p50_ms: Half of them were faster.
        p99_ms: All but one in a hundred were faster.
        num_failed: Requests without such an answer.
    """

    requests_per_s: float
    p50_ms: float
    p99_ms: float
    num_failed: int


def client_name() -> str:
    """Say what loads."""
    return "wrk" if shutil.which("wrk") else "a client of our own (asyncio; slower than wrk)"


def load(url: str, body: bytes, *, num_connections: int, seconds: float) -> Loaded:
    """Send one request after the other on every connection.

    Args:
        url: Where to.
        body: What.
        num_connections: How many at once.
        seconds: For how long.
    """
    if shutil.which("wrk") is None:
        command = [sys.executable, __file__, url, str(num_connections), str(seconds)]
        done = subprocess.run(command, input=body, capture_output=True, check=True, timeout=seconds + 60)
        return Loaded(**json.loads(done.stdout))
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder, "post.lua")
        script.write_text(SCRIPT.replace("{body}", body.decode()))
        words = [
            "wrk",
            "-t1",
            f"-c{num_connections}",
            f"-d{seconds:g}s",
            "--timeout",
            "30s",
            "-s",
            str(script),
            url,
        ]
        done = subprocess.run(words, capture_output=True, check=True, timeout=seconds + 60)
    found = re.search(r"RESULT (\d+) (\d+) (\d+) (\d+) (\d+)", done.stdout.decode())
    assert found is not None, done.stdout.decode()
    requests, duration_us, failed, p50_us, p99_us = map(int, found.groups())
    return Loaded((requests - failed) / duration_us * 1e6, p50_us / 1000, p99_us / 1000, failed)


async def _connection(url: str, request: bytes, end: float, latencies: list[float], failed: list[str]) -> None:
    parts = urlsplit(url)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    try:
        while (begin := time.perf_counter()) < end:
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            await reader.readexactly(int(length[1]) if length else 0)
            if head.startswith(b"http/1.1 200"):
                latencies.append(time.perf_counter() - begin)
            else:
                failed.append(head[:15].decode())
    except (OSError, asyncio.IncompleteReadError) as error:
        failed.append(repr(error))
    finally:
        writer.close()


async def _load(url: str, body: bytes, num_connections: int, seconds: float) -> Loaded:
    parts = urlsplit(url)
    head = f"POST {parts.path} HTTP/1.1\r\nhost: {parts.netloc}\r\ncontent-type: application/json\r\n"
    request = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
    latencies: list[float] = []
    failed: list[str] = []
    begin = time.perf_counter()
    connections = (_connection(url, request, begin + seconds, latencies, failed) for _ in range(num_connections))
    await asyncio.gather(*connections)
    taken = time.perf_counter() - begin
    ordered = sorted(latencies) or [float("nan")]
    p50, p99 = (ordered[int(share * (len(ordered) - 1))] * 1000 for share in (0.5, 0.99))
    return Loaded(len(latencies) / taken, p50, p99, len(failed))


if __name__ == "__main__":
    asked = _load(sys.argv[1], sys.stdin.buffer.read(), int(sys.argv[2]), float(sys.argv[3]))
    print(json.dumps(asdict(asyncio.run(asked))))
