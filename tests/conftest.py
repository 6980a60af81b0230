"""Shared by every tier: nothing in a test reaches the network or the user's own settings."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import httpx
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def s3_bucket() -> Iterator[str]:
    """An S3 server of this process with one bucket; the environment points to it. Yields `s3://bucket`."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "an-access-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-key")
        patch.setenv("AWS_REGION", "us-east-1")
        httpx.put(f"http://{host}:{port}/eagleray-tests", trust_env=False).raise_for_status()
        yield "s3://eagleray-tests"
    server.stop()
