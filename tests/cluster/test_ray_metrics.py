"""What a training run shows on Ray's own metrics."""

from __future__ import annotations

import time

import httpx
from ray_cluster import RayCluster

from eagleray.cluster import connect
from eagleray_jobs.train.spec import MetricRecord
from eagleray_jobs.train.worker import RayMetrics

TIMEOUT_S = 60.0
RECORD = MetricRecord(
    step=7,
    epoch=0.5,
    loss=1.25,
    learning_rate=0.1,
    grad_norm=2.0,
    examples_per_s=100.0,
    tokens_per_s=900.0,
    memory_bytes=12345,
)


def find_line(url: str, start: str) -> str | None:
    """Return the metric's line once it is there."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        lines = httpx.get(url, timeout=10).text.splitlines()
        found = next((line for line in lines if line.startswith(start)), None)
        if found is not None:
            return found
        time.sleep(0.5)
    return None


def test_the_last_record_is_on_the_nodes_metrics_for_prometheus(ray_cluster: RayCluster) -> None:
    import ray

    with connect(ray_cluster.address):
        sink = RayMetrics("a-run")
        sink.write([RECORD])
        node = ray.nodes()[0]
        url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
        line = find_line(url, "ray_eagleray_train_loss{")
        sink.close()
    assert line is not None and 'run="a-run"' in line and line.endswith(" 1.25"), line
