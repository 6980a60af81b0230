"""What the user sees while a run goes on: a live panel on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from types import TracebackType
from typing import IO, Any, Protocol, Self

from eagleray_jobs.train.board import Event, Phase, Saved
from eagleray_jobs.train.progress import Goal
from eagleray_jobs.train.spec import MetricRecord

PLAIN_INTERVAL_S = 2.0


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that is shown, folded from the events so far.

    Attributes:
        max_steps: Optimizer steps of the whole run.
        global_batch_size: Examples per step.
        phase: The phase that is going on.
        phases_s: Seconds of the phases that are over.
        since_s: When the phase began, on a monotonic clock.
        record: The newest metrics.
        best: The best score and its step.
        last_ref: The last committed version.
        restarts: How often the workers were restarted.
    """

    max_steps: int
    global_batch_size: int
    phase: str
    since_s: float
    phases_s: dict[str, float] = field(default_factory=dict)
    record: MetricRecord | None = None
    best: tuple[float, int] | None = None
    last_ref: str | None = None
    restarts: int = 0

    def after(self, event: Event, at_s: float, goal: Goal) -> Snapshot:
        """Return the snapshot with one more event."""
        match event:
            case Phase():
                return self.enter(event.name, at_s, event.restarts)
            case Saved():
                return replace(self, last_ref=event.ref or self.last_ref)
            case MetricRecord():
                return replace(self, record=event, best=self._best(event, goal))

    def enter(self, phase: str, at_s: float, restarts: int = 0) -> Snapshot:
        """Return the snapshot after the present phase has given way to another."""
        spent = self.phases_s.get(self.phase, 0.0) + max(0.0, at_s - self.since_s)
        phases_s = {**self.phases_s, self.phase: round(spent, 3)}
        return replace(self, phase=phase, since_s=at_s, phases_s=phases_s, restarts=max(self.restarts, restarts))

    def _best(self, record: MetricRecord, goal: Goal) -> tuple[float, int] | None:
        value = (record.scores or {}).get(goal.metric)
        if value is None or (self.best is not None and not goal.is_better(value, self.best[0])):
            return self.best
        return value, record.step

    def eta_s(self) -> float | None:
        """Return the seconds until the last step at the present speed, None before it is known."""
        if self.record is None or self.record.examples_per_s <= 0:
            return None
        return (self.max_steps - self.record.step) * self.global_batch_size / self.record.examples_per_s

    def rows(self) -> list[tuple[str, str]]:
        """Return what is known, as labels and texts."""
        record = self.record
        if record is None:
            return []
        eta_s = self.eta_s()
        rows = [
            ("step", f"{record.step}/{self.max_steps}"),
            ("ETA", "" if eta_s is None else duration(eta_s)),
            ("loss", f"{record.loss:.4f}"),
            ("lr", f"{record.learning_rate:.3g}"),
            ("tokens/s", f"{record.tokens_per_s:,.0f}"),
            ("memory", f"{record.memory_bytes / 2**20:,.0f} MiB"),
        ]
        if self.best is not None:
            rows.append(("best", f"{self.best[0]:.4f} at {self.best[1]}"))
        return rows


def duration(seconds: float) -> str:
    """Spell seconds as `42s`, `3m05s` or `2h07m`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def headline(scores: Mapping[str, float]) -> str:
    """Spell the scores of the whole split; those of its kinds (`accuracy/date`) are in the record."""
    return ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if "/" not in name)


class View(Protocol):
    """Where a run is shown."""

    def show(self, snapshot: Snapshot, event: Event | None) -> None:
        """Show the snapshot; `event` is what changed it, None when only time has passed."""
        ...

    def note(self, text: str) -> None:
        """Say something once."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...


class PlainView:
    """One line per event, for a stream that is no terminal; metrics at most every two seconds.

    Args:
        say: Takes a line.
        clock: Monotonic seconds.
    """

    def __init__(self, say: Callable[[str], None], clock: Callable[[], float] = time.monotonic) -> None:
        self._say, self._clock = say, clock
        self._next_s = 0.0

    def show(self, snapshot: Snapshot, event: Event | None) -> None:
        """Write a line about the event, unless one of its kind has just been written."""
        match event:
            case Phase():
                self._phase(snapshot, event)
            case Saved(ref=None):
                self.note(f"save of step {event.step} failed: {event.error}")
            case Saved():
                self.note(f"committed {event.ref}")
            case MetricRecord():
                self._metrics(snapshot, event)

    def _phase(self, snapshot: Snapshot, event: Phase) -> None:
        over = list(snapshot.phases_s.items())[-1:]
        spent = "".join(f" ({name} took {seconds:.1f} s)" for name, seconds in over)
        again = f" [restart {event.restarts}]" if event.restarts else ""
        self.note(f"{event.name}{again}{spent}")

    def _metrics(self, snapshot: Snapshot, record: MetricRecord) -> None:
        if record.scores is None and record.step < snapshot.max_steps and self._clock() < self._next_s:
            return
        self._next_s = self._clock() + PLAIN_INTERVAL_S
        parts = [f"{label} {text}" for label, text in snapshot.rows() if text]
        if record.scores:
            parts.append(f"evaluation: {headline(record.scores)}")
        self.note("  ".join(parts))

    def note(self, text: str) -> None:
        """Write a line."""
        self._say(text)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing is held."""


class LiveView:
    """A panel that is redrawn in place; what is said once stays above it."""

    def __init__(self, stream: IO[str], title: str) -> None:
        from rich.console import Console
        from rich.live import Live

        self._title = title
        self._console = Console(file=stream)
        self._live: Any = Live(console=self._console, refresh_per_second=4, transient=False)
        self._plain = PlainView(self.note)

    def show(self, snapshot: Snapshot, event: Event | None) -> None:
        """Redraw the panel; commits and failures also stay above it."""
        if isinstance(event, Saved):
            self._plain.show(snapshot, event)
        self._live.update(self._panel(snapshot))

    def note(self, text: str) -> None:
        """Write a line above the panel."""
        self._console.print(text, markup=False, highlight=False)

    def _panel(self, snapshot: Snapshot) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2))
        rows = snapshot.rows()
        grid.add_row(*(label for label, _ in rows), style="dim")
        grid.add_row(*(text for _, text in rows))
        spent = max(0.0, time.monotonic() - snapshot.since_s)
        phases = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in snapshot.phases_s.items())
        status = f"{snapshot.phase} {duration(spent)}" + (f"  (before: {phases})" if phases else "")
        done = snapshot.record.step if snapshot.record else 0
        return Panel(Group(ProgressBar(total=snapshot.max_steps, completed=done), grid, status), title=self._title)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._live.__exit__(kind, error, traceback)


def open_view(stream: IO[str], title: str) -> View:
    """Return the view that fits a stream."""
    if stream.isatty():
        return LiveView(stream, title)
    return PlainView(partial(print, file=stream, flush=True))
