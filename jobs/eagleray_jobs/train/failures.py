"""Failures of workers as values: which end the run, which are worth a restart, and how many become one message."""

from __future__ import annotations

import pickle
import traceback
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from eagleray.errors import EaglerayError, PeersLostError, WorkerError, WorkerMemoryError
from eagleray_jobs.train.whereabouts import RanksMissingError, Whereabouts

_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "connectfullmesh",
    "socket closed",
    "timed out waiting",
    "timed out after",
    "application timeout caused pair closure",
    "nccl",
)
"""What gloo and NCCL say when another rank is gone: they raise plain RuntimeErrors."""


@dataclass(frozen=True, slots=True)
class RankFailure:
    """What a rank raised, in a form that always survives pickling.

    Attributes:
        world_rank: The rank.
        kind: Class of the error.
        message: Its text.
        traceback: Its traceback, as Python prints it.
        lost_peer: Another rank went away first; this one only noticed.
        error: Our own error, with its message and exit status; None for any other class.
        whereabouts: Where all ranks were, as far as a rank that lost a peer found out.
    """

    world_rank: int
    kind: str
    message: str
    traceback: str
    lost_peer: bool
    error: EaglerayError | None = None
    whereabouts: tuple[Whereabouts, ...] = ()

    @classmethod
    def of(cls, world_rank: int, error: BaseException) -> RankFailure:
        """Describe an error that a rank raised."""
        text = "".join(traceback.format_exception(error))
        own = error if isinstance(error, EaglerayError) and _survives(error) else None
        found = error.whereabouts if isinstance(error, RanksMissingError) else ()
        return cls(world_rank, type(error).__name__, str(error), text, is_lost_peer(error), own, found)


def _survives(error: EaglerayError) -> bool:
    try:
        return type(pickle.loads(pickle.dumps(error))) is type(error)
    except Exception:
        return False  # it goes on as text instead: kind, message and traceback


def is_lost_peer(error: BaseException) -> bool:
    """Say whether a rank raised only because another one did not come, or went away.

    What an error was raised from counts: torch's pipelines wrap whatever a stage raises.
    """
    if isinstance(error, EaglerayError):
        return isinstance(error, PeersLostError)
    if isinstance(error, ConnectionError | RanksMissingError):
        return True
    names = {each.__name__ for each in type(error).__mro__}
    if names & {"DistBackendError", "DistNetworkError", "AcceleratorError"}:
        return True
    if isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _LOST_PEER):
        return True
    return error.__cause__ is not None and is_lost_peer(error.__cause__)


def find_fatal(failures: Sequence[RankFailure]) -> bool:
    """Whether the run ends: a rank raised for a reason of its own, which a restart would only repeat."""
    return any(not failure.lost_peer for failure in failures)


def merge(failures: Sequence[RankFailure], dead: Iterable[int] = (), hint: str | None = None) -> EaglerayError:
    """Make one error of the failures of all ranks.

    Equal errors become one with a list of ranks; ranks that only lost a peer are named as such. Our own errors
    keep their class, message and exit status.

    Args:
        failures: What ranks raised.
        dead: Ranks whose process died without raising.
        hint: Where to look, for an error that brings no hint of its own.
    """
    causes: dict[tuple[str, str], list[RankFailure]] = defaultdict(list)
    waited: list[int] = []
    for failure in sorted(failures, key=lambda each: each.world_rank):
        if failure.lost_peer:
            waited.append(failure.world_rank)
        else:
            # Ranks run out of memory one after the other, each with a number of its own.
            message = "" if isinstance(failure.error, WorkerMemoryError) else failure.message
            causes[failure.kind, message].append(failure)
    if not causes:
        return _loss(failures, sorted(dead), waited)
    first, *others = causes.values()
    own = first[0].error
    if own is not None and not others:
        return own
    parts = [_describe(group) for group in (first, *others)]
    if waited:
        parts.append(f"{spell_ranks(waited)} only waited and lost the connection")
    return WorkerError("\n".join(parts), hint)


def _describe(group: Sequence[RankFailure]) -> str:
    ranks = spell_ranks([failure.world_rank for failure in group])
    return f"{ranks} raised {group[0].kind}: {group[0].message}\n{group[0].traceback.rstrip()}"


def _loss(failures: Sequence[RankFailure], dead: Sequence[int], waited: Sequence[int]) -> WorkerError:
    """Describe the end of a run in which no rank raised for a reason of its own."""
    if dead or not any(failure.whereabouts for failure in failures):
        return WorkerError(_death(dead, waited), "Look for the kernel's out-of-memory killer and lost nodes.")
    fullest = max((failure.whereabouts for failure in failures), key=_num_answers)
    waiting = sorted({each.world_rank for each in fullest if each.waits} | set(waited))
    missing = [each.world_rank for each in fullest if each.world_rank not in waiting]
    shown = "\n  ".join(map(str, fullest))
    if not missing:
        return WorkerError(
            f"{spell_ranks(waiting)} waited for each other, each in another collective\n  {shown}",
            "Every rank must call the same collectives in the same order: see the lines where they are.",
        )
    return WorkerError(
        f"{spell_ranks(missing)} did not come to a collective in which {spell_ranks(waiting)} waited\n  {shown}",
        "What a rank does longer than train.ddp_timeout is taken for a hang: see the line where it is.",
    )


def _num_answers(whereabouts: Sequence[Whereabouts]) -> int:
    return sum(each.doing is not None for each in whereabouts)


def _death(dead: Sequence[int], waited: Sequence[int]) -> str:
    lost = f"the process of {spell_ranks(dead)} died" if dead else "a worker was lost"
    return f"{lost}; {spell_ranks(waited)} noticed" if waited else lost


def spell_ranks(ranks: Sequence[int]) -> str:
    """Name ranks: `rank 3`, `ranks 0, 2`."""
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
