"""The timelines of all ranks as a Chrome trace and as a picture, and the bubble that a pipeline has in them."""

from __future__ import annotations

import html
import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from eagleray.parallel.timeline import Kind, Span

PASSES: tuple[Kind, ...] = ("forward", "backward", "weights")
COLORS: Mapping[Kind, str] = {
    "data": "#b0a08c",
    "forward": "#4e79a7",
    "backward": "#59a14f",
    "weights": "#8cd17d",
    "exchange": "#d4a6c8",
    "clip": "#f1ce63",
    "optimizer": "#f28e2b",
    "evaluate": "#76b7b2",
    "save": "#9c755f",
    "collective": "#e15759",
}
"""What is drawn; `step` and `pipeline` only hold others."""


@dataclass(frozen=True, slots=True)
class RankTimeline:
    """What one rank recorded.

    Attributes:
        world_rank: The rank.
        place: Where it stands in the mesh: `pp 0, tp 1`.
        spans: Its spans.
    """

    world_rank: int
    place: str
    spans: list[Span]


def chrome_trace(ranks: Sequence[RankTimeline], about: Mapping[str, Any]) -> bytes:
    """Return a JSON file that chrome://tracing and Perfetto open: a process for each rank, collectives below it.

    Args:
        ranks: All ranks.
        about: What is kept with it: name, layout, steps.
    """
    start_ns = _start(ranks)
    events: list[dict[str, Any]] = []
    for rank in ranks:
        name = f"rank {rank.world_rank}" + (f" ({rank.place})" if rank.place else "")
        events.append(_meta("process_name", rank.world_rank, 0, {"name": name}))
        events.append(_meta("process_sort_index", rank.world_rank, 0, {"sort_index": rank.world_rank}))
        for lane in sorted({span.lane for span in rank.spans}):
            title = "steps" if lane == 0 else f"collectives {lane}"
            events.append(_meta("thread_name", rank.world_rank, lane, {"name": title}))
        events += [_event(rank.world_rank, span, start_ns) for span in rank.spans]
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms", "otherData": dict(about)}).encode()


def bubble(pipeline: Sequence[Sequence[Span]]) -> float:
    """Return the share of time, from the first pass to the last, in which ranks of a pipeline compute nothing.

    The median over the steps; 0 where there is only one rank.

    Args:
        pipeline: The spans of each of its ranks.
    """
    shares = []
    for step in sorted({span.step for spans in pipeline for span in spans if span.kind in PASSES}):
        passes = [[s for s in spans if s.step == step and s.kind in PASSES] for spans in pipeline]
        start = min(span.start_ns for spans in passes for span in spans)
        end = max(span.end_ns for spans in passes for span in spans)
        busy = sum(span.end_ns - span.start_ns for spans in passes for span in spans)
        shares.append(1 - busy / ((end - start) * len(pipeline)))
    return statistics.median(shares) if shares else 0.0


def ideal_bubble(num_ranks: int, num_micro_batches: int, stages_per_rank: int = 1) -> float:
    """Return the bubble of GPipe and 1F1B with equal stages: (p - 1) / (v m + p - 1).

    With v stages per rank it is that of the interleaved schedule (Narayanan et al. 2021, arXiv 2104.04473).

    Args:
        num_ranks: Ranks of the pipeline, p.
        num_micro_batches: Micro-batches of a step, m.
        stages_per_rank: v.
    """
    return (num_ranks - 1) / (stages_per_rank * num_micro_batches + num_ranks - 1)


def bubbles(ranks: Sequence[RankTimeline]) -> tuple[float, float] | None:
    """Return the bubble of the run's pipelines, of several the median, and the ideal one; None: there are none."""
    pipelines: dict[str, list[list[Span]]] = {}
    for rank in ranks:
        axes = rank.place.split(", ")
        others = [axis for axis in axes if not axis.startswith("pp ")]
        if len(others) < len(axes):
            pipelines.setdefault(", ".join(others), []).append(rank.spans)
    if not pipelines:
        return None
    members = next(iter(pipelines.values()))
    passes = [span for spans in members for span in spans if span.kind in PASSES]
    num_micro_batches, num_stages = len({s.micro_batch for s in passes}), len({s.stage for s in passes})
    found = statistics.median(bubble(pipeline) for pipeline in pipelines.values())
    return found, ideal_bubble(len(members), num_micro_batches, num_stages // len(members))


ROW_HEIGHT, STRIP_HEIGHT, GAP, LEFT, TOP, WIDTH = 26, 8, 10, 150, 54, 1500


def picture(ranks: Sequence[RankTimeline], title: str) -> bytes:
    """Return an SVG: a row of each rank, its collectives as a strip below, time from left to right."""
    start_ns, end_ns = _start(ranks), max((s.end_ns for rank in ranks for s in rank.spans), default=1)
    scale = WIDTH / max(end_ns - start_ns, 1)
    pitch = ROW_HEIGHT + STRIP_HEIGHT + GAP
    height = TOP + pitch * len(ranks) + 40
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 20}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="white"/>',
        f'<text x="10" y="20" font-size="14">{html.escape(title)}</text>',
        *_legend(),
    ]
    for number, rank in enumerate(ranks):
        y = TOP + number * pitch
        place = f"<tspan dx='4' fill='#666'> {html.escape(rank.place)}</tspan>"
        parts.append(f'<text x="10" y="{y + 17}">rank {rank.world_rank}{place}</text>')
        parts.append(f'<rect x="{LEFT}" y="{y}" width="{WIDTH}" height="{ROW_HEIGHT}" fill="#f3f3f3"/>')
        for span in rank.spans:
            parts += _drawn(span, y, start_ns, scale)
    parts += _axis(TOP + pitch * len(ranks), end_ns - start_ns, scale)
    return "\n".join([*parts, "</svg>", ""]).encode()


def _drawn(span: Span, y: int, start_ns: int, scale: float) -> list[str]:
    x, width = LEFT + (span.start_ns - start_ns) * scale, max((span.end_ns - span.start_ns) * scale, 0.2)
    if span.kind == "step":
        line = f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y - 4}" y2="{y + ROW_HEIGHT + STRIP_HEIGHT}" stroke="#555"/>'
        return [line, f'<text x="{x + 3:.1f}" y="{y - 1}" font-size="9" fill="#555">step {span.step}</text>']
    if span.kind not in COLORS:
        return []
    top, height = (y + ROW_HEIGHT + 1, STRIP_HEIGHT - 1) if span.lane else (y + 1, ROW_HEIGHT - 2)
    about = html.escape(f"{_label(span)}, {(span.end_ns - span.start_ns) / 1e6:.2f} ms")
    box = (
        f'<rect x="{x:.2f}" y="{top}" width="{width:.2f}" height="{height}" fill="{COLORS[span.kind]}" '
        f'stroke="white" stroke-width="0.3"><title>{about}</title></rect>'
    )
    if span.micro_batch is None or width < 9:
        return [box]
    middle = x + width / 2
    number = f'<text x="{middle:.1f}" y="{y + 17}" fill="white" font-size="10" text-anchor="middle">'
    return [box, f"{number}{span.micro_batch}</text>"]


def _legend() -> Iterable[str]:
    for number, (kind, color) in enumerate(COLORS.items()):
        x = LEFT + number * 110
        yield f'<rect x="{x}" y="28" width="10" height="10" fill="{color}"/>'
        yield f'<text x="{x + 14}" y="37" font-size="11">{kind}</text>'


def _axis(y: int, length_ns: int, scale: float) -> Iterable[str]:
    tick_ns = next(t for t in _ticks() if length_ns / t <= 15)
    for number in range(int(length_ns // tick_ns) + 1):
        x = LEFT + number * tick_ns * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y}" y2="{y + 5}" stroke="#999"/>'
        label = f"{number * tick_ns / 1e6:g} ms"
        yield f'<text x="{x:.1f}" y="{y + 18}" font-size="10" fill="#666" text-anchor="middle">{label}</text>'


def _ticks() -> Iterable[int]:
    power = 1_000
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _event(pid: int, span: Span, start_ns: int) -> dict[str, Any]:
    keys = ("step", "micro_batch", "stage")
    about = {key: value for key in keys if (value := getattr(span, key)) is not None}
    return {
        "name": _label(span),
        "cat": span.kind,
        "ph": "X",
        "ts": (span.start_ns - start_ns) / 1e3,
        "dur": (span.end_ns - span.start_ns) / 1e3,
        "pid": pid,
        "tid": span.lane,
        "args": about,
    }


def _label(span: Span) -> str:
    if span.kind == "step":
        return f"step {span.step}"
    words = [span.name or span.kind]
    if span.micro_batch is not None:
        words.append(f"of micro-batch {span.micro_batch}")
    if span.stage is not None:
        words.append(f"on stage {span.stage}")
    return " ".join(words)


def _meta(name: str, pid: int, tid: int, about: Mapping[str, Any]) -> dict[str, Any]:
    return {"name": name, "ph": "M", "pid": pid, "tid": tid, "args": dict(about)}


def _start(ranks: Sequence[RankTimeline]) -> int:
    return min((span.start_ns for rank in ranks for span in rank.spans), default=0)
