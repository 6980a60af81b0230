"""Tables of the serving benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from http_load import Loaded
from results_page import markdown_table

OURS = "eagleray serve"
PATTERN = "Ray Serve as documented"
MIN_REQUESTS_PER_S = 1500
MIN_TIMES_PATTERN = 5
MIN_SPEEDUP = 1.85


@dataclass(frozen=True, slots=True)
class BulkRun:
    """What so many replicas did in one round.

    Attributes:
        sentences_per_s: Of one large request.
        at_rest_ms: Small requests, one at a time, while nothing else runs.
        beside_ms: The same while a large one runs.
        batch_ms: One request of a full batch at rest.
    """

    sentences_per_s: float
    at_rest_ms: Sequence[float]
    beside_ms: Sequence[float]
    batch_ms: float


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a share of them stays under."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def report_requests(
    runs: Mapping[str, Sequence[tuple[Loaded, Loaded]]], num_rounds: int, seconds: float, machine: str, client: str
) -> str:
    """Return the table of the way of a request."""
    rows = []
    for side, found in runs.items():
        speeds = [many.requests_per_s for many, _ in found]
        ratio = ""
        if side != OURS:
            ratio = f"{median(a.requests_per_s / b for (a, _), b in zip(runs[OURS], speeds, strict=True)):.2f}"
        target = {OURS: f">= {MIN_REQUESTS_PER_S:,}", PATTERN: f"ours >= {MIN_TIMES_PATTERN} times"}.get(side, "")
        rows.append(
            (
                side,
                f"{median(speeds):,.0f}",
                f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                f"{median(many.p99_ms for many, _ in found):.1f}",
                f"{median(one.p50_ms for _, one in found):.2f}",
                str(sum(many.num_failed + one.num_failed for many, one in found)),
                ratio,
                target,
            )
        )
    headers = (
        "a no-op model",
        "requests/s",
        "slowest to fastest",
        "p99 ms",
        "one at rest, ms",
        "failed",
        "ours / this",
        "target",
    )
    about = (
        f"{machine}. Load: {client} on the same machine, 16 connections for {seconds:g} s, then one. Medians of "
        f"{num_rounds} rounds; a ratio is the median of the rounds' ratios."
    )
    missing = [] if "LitServe" in runs else ["LitServe is not installed here: pip install 'eagleray[bench]'."]
    return "\n\n".join([about, markdown_table(headers, rows), *missing])


def report_bulk(runs: Mapping[int, Sequence[BulkRun]], num_sentences: int, machine: str) -> str:
    """Return the tables of large requests, and of small ones beside them.

    Args:
        runs: Of each number of replicas, per round.
        num_sentences: Of a large request.
        machine: Where.
    """
    speeds = {count: [run.sentences_per_s for run in found] for count, found in runs.items()}
    speedup = median(two / one for one, two in zip(speeds[1], speeds[2], strict=True))
    rows = [
        (
            f"{count} replica{'s' if count > 1 else ''}, one thread each",
            f"{median(found):,.0f}",
            f"{min(found):,.0f} to {max(found):,.0f}",
            f"{speedup:.2f}" if count == 2 else "",
            f">= {MIN_SPEEDUP}" if count == 2 else "",
        )
        for count, found in speeds.items()
    ]
    beside = []
    for count, found in runs.items():
        shown = (
            median(percentile(run.at_rest_ms, 0.99) for run in found),
            median(run.batch_ms for run in found),
            median(percentile(run.beside_ms, 0.5) for run in found),
            median(percentile(run.beside_ms, 0.99) for run in found),
        )
        limit = median(2 * percentile(run.at_rest_ms, 0.99) + run.batch_ms for run in found)
        beside.append((f"{count}", *(f"{value:.0f}" for value in shown), f"< {limit:.0f}"))
    about = (
        f"{machine}. One request of {num_sentences:,} sentences. Medians of {len(runs[1])} interleaved rounds; "
        "the ratio is the median of the rounds' ratios."
    )
    large = (f"{num_sentences:,} sentences at once", "sentences/s", "slowest to fastest", "2 / 1", "target")
    small = ("replicas", "p99 at rest, ms", "one batch, ms", "p50 beside bulk", "p99 beside bulk", "target")
    return "\n\n".join([about, markdown_table(large, rows), markdown_table(small, beside)])
