"""Tables of the serving benchmark."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from http_load import Loaded
from results_page import markdown_table

OURS = "eagleray serve"
PATTERN = "Ray Serve as documented"
MIN_REQUESTS_PER_S = 1500
MIN_TIMES_PATTERN = 5
MIN_SPEEDUP = 1.85
MAX_DECIDED_S, MAX_ANSWERING_S = 5, 20


@dataclass(frozen=True, slots=True)
class ScaledUp:
    """How a second replica came.

    Attributes:
        decided_s: From the beginning of the load to the decision.
        answering_s: From the decision to the second replica's first answer, which it tells within two seconds.
    """

    decided_s: float
    answering_s: float


@dataclass(frozen=True, slots=True)
class Replicas:
    """How a model is served: with `serve.engine`, by so many replicas."""

    engine: str
    count: int

    @property
    def name(self) -> str:
        """How tables call it."""
        engine = "" if self.engine == "auto" else f", `engine: {self.engine}`"
        return f"{self.count} replica{'s' if self.count > 1 else ''}{engine}"


@dataclass(frozen=True, slots=True)
class BulkRun:
    """What some replicas did in one round.

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


def report_bulk(runs: Mapping[Replicas, Sequence[BulkRun]], num_sentences: int, machine: str) -> str:
    """Return the tables of large requests, and of small ones beside them.

    Args:
        runs: Of one and of two replicas with each engine, per round.
        num_sentences: Of a large request.
        machine: Where.
    """
    rows, beside = [], []
    for side, found in runs.items():
        speeds = [run.sentences_per_s for run in found]
        alone = [run.sentences_per_s for run in runs[replace(side, count=1)]]
        speedup = median(many / one for one, many in zip(alone, speeds, strict=True))
        shown = (f"{speedup:.2f}", f">= {MIN_SPEEDUP}") if side.count > 1 else ("", "")
        rows.append((side.name, f"{median(speeds):,.0f}", f"{min(speeds):,.0f} to {max(speeds):,.0f}", *shown))
        # Of all rounds together: the slowest of a hundred is not to be told from one round.
        at_rest = percentile([value for run in found for value in run.at_rest_ms], 0.99)
        small = [value for run in found for value in run.beside_ms]
        batch = median(run.batch_ms for run in found)
        times = (at_rest, batch, percentile(small, 0.5), percentile(small, 0.99))
        beside.append((side.name, *(f"{value:.0f}" for value in times), f"< {2 * at_rest + batch:.0f}"))
    about = (
        f"{machine}. One request of {num_sentences:,} sentences; {len(small):,} small ones beside it. Medians of "
        f"{len(found)} interleaved rounds; a ratio is the median of the rounds' ratios."
    )
    large = (f"{num_sentences:,} sentences at once", "sentences/s", "slowest to fastest", "2 / 1", "target")
    headers = (
        "small requests",
        "p99 at rest, ms",
        "one batch, ms",
        "p50 beside bulk",
        "p99 beside bulk",
        "target",
    )
    return "\n\n".join([about, markdown_table(large, rows), markdown_table(headers, beside)])


def report_scaling(runs: Sequence[ScaledUp], machine: str) -> str:
    """Return the table of how a second replica comes."""
    rows = [
        (what, f"{median(found):.1f}", f"{min(found):.1f} to {max(found):.1f}", f"<= {target}")
        for what, found, target in (
            ("until it is wanted", [run.decided_s for run in runs], MAX_DECIDED_S),
            ("from then until it has answered", [run.answering_s for run in runs], MAX_ANSWERING_S),
        )
    ]
    about = f"{machine}. Medians of {len(runs)} servers, each with one replica when the load begins."
    headers = ("a second replica, seconds", "median", "fastest to slowest", "target")
    return "\n\n".join([about, markdown_table(headers, rows)])
