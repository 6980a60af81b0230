"""Prometheus metrics: each process counts for itself and tells the edge, which shows them all at `/metrics`.

Ray's own exporter is no part of it: it needs an agent, adds seconds and thousands of series, and counts no tokens.
What a replica tells is values, so that the edge needs to know nothing of what is counted where; each series
carries a replica's model and id, as it would where every process is scraped by itself, and goes with its replica.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from eagleray_serving.visits import Usage

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
EDGE = "edge"
QUEUED = "eagleray_queued_tokens"
# A replica that has said nothing for this long is gone, or hangs.
REPORT_LIFE_S = 10.0
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
BATCH_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
BATCH_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True, slots=True)
class Family:
    """One metric of one process; crosses processes.

    Attributes:
        name: Its name.
        help: What it is.
        type: What Prometheus calls it.
        samples: Name, labels and value of each series.
    """

    name: str
    help: str
    type: str
    samples: tuple[tuple[str, Mapping[str, str], float], ...]


class Metrics:
    """What one process counts."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        self._series: dict[tuple[str | int, ...], tuple[Any, ...]] = {}
        served = ("model", "version", "lane")
        self._requests = Counter(
            "eagleray_requests", "Requests answered.", ("route", "method", "status"), registry=registry
        )
        self._request_s = Histogram(
            "eagleray_request_seconds", "From a request's arrival to its answer.", ("route",),
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._items = Counter("eagleray_items", "Items answered.", served, registry=registry)
        self._tokens = Counter("eagleray_tokens", "Tokens of the input.", served, registry=registry)
        self._answer_s = Histogram(
            "eagleray_answer_seconds", "What a model needs for a request, its queue included.", served,
            buckets=SECONDS, registry=registry,
        )  # fmt: skip
        self._batch_items = Histogram(
            "eagleray_batch_items",
            "Items in work, at each step of the model.",
            buckets=BATCH_ITEMS,
            registry=registry,
        )
        self._batch_tokens = Histogram(
            "eagleray_batch_tokens",
            "Tokens in work, at each step of the model.",
            buckets=BATCH_TOKENS,
            registry=registry,
        )
        self._queued = Gauge(QUEUED, "Tokens that wait for the model.", registry=registry)

    def count_request(self, route: str, method: str, status: int, seconds: float) -> None:
        """Count a request that entered by this process."""
        # Finding a series by its labels costs more than counting: it is done once for each.
        found = self._series.get((route, method, status))
        if found is None:
            counted, timed = self._requests.labels(route, method, str(status)), self._request_s.labels(route)
            found = self._series[route, method, status] = (counted, timed)
        found[0].inc()
        found[1].observe(seconds)

    def count_answer(self, usage: Usage, seconds: float) -> None:
        """Count what a model of this process answered."""
        labels = (usage.model, usage.version, usage.lane)
        found = self._series.get(labels)
        if found is None:
            every = (self._items, self._tokens, self._answer_s)
            found = self._series[labels] = tuple(metric.labels(*labels) for metric in every)
        found[0].inc(usage.num_items)
        found[1].inc(usage.num_tokens)
        found[2].observe(seconds)

    def count_batch(self, num_items: int, num_tokens: int) -> None:
        """Count what is in work at a step of the model of this process."""
        self._batch_items.observe(num_items)
        self._batch_tokens.observe(num_tokens)

    def watch_queue(self, num_queued_tokens: Callable[[], float]) -> None:
        """Say how much waits, whenever it is asked."""
        self._queued.set_function(num_queued_tokens)

    def families(self) -> list[Family]:
        """Return everything that was counted."""
        return [
            Family(
                metric.name,
                metric.documentation,
                metric.type,
                tuple(
                    (sample.name, dict(sample.labels), sample.value)
                    for sample in metric.samples
                    if not sample.name.endswith("_created")
                ),
            )
            for metric in self._registry.collect()
        ]


class Reports:
    """What the replicas of a server told last.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[tuple[str, str], tuple[float, list[Family]]] = {}

    def take(self, model: str, replica: str, families: list[Family]) -> int:
        """Take a replica's report; returns how many replicas of its model run."""
        self._told[model, replica] = self._clock(), families
        return sum(name == model for name, _ in self._live())

    def queued_tokens(self) -> dict[str, int]:
        """Return how many tokens wait for each model, over all of its replicas that told."""
        found: dict[str, int] = {}
        for (model, _), families in self._live().items():
            for name, _, value in (sample for family in families for sample in family.samples):
                if name == QUEUED:
                    found[model] = found.get(model, 0) + round(value)
        return found

    def render(self, own: Metrics) -> bytes:
        """Return all of it, and what the edge counted itself, in Prometheus's text format."""
        sources: list[tuple[dict[str, str], list[Family]]] = [({"replica": EDGE}, own.families())]
        for (model, replica), told in self._live().items():
            sources.append(({"model": model, "replica": replica}, told))
        merged: dict[str, Metric] = {}
        for origin, families in sources:
            for family in families:
                metric = merged.setdefault(family.name, Metric(family.name, family.help, family.type))
                for name, labels, value in family.samples:
                    metric.add_sample(name, {**labels, **origin}, value)
        registry = CollectorRegistry()
        registry.register(_Collected(merged.values()))
        return generate_latest(registry)

    def _live(self) -> dict[tuple[str, str], list[Family]]:
        limit = self._clock() - REPORT_LIFE_S
        self._told = {key: told for key, told in self._told.items() if told[0] >= limit}
        return {key: families for key, (_, families) in self._told.items()}


class _Collected(Collector):
    def __init__(self, metrics: Iterable[Metric]) -> None:
        self._metrics = list(metrics)

    def collect(self) -> Iterator[Metric]:
        return iter(self._metrics)
