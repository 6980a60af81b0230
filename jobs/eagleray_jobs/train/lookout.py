"""When a rank no longer comes, the ranks tell each other where they are, through the store of their group."""

from __future__ import annotations

import json
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from eagleray.scheduling import give_way
from eagleray_jobs.train.failures import is_lost_peer
from eagleray_jobs.train.whereabouts import RanksMissingError, Whereabouts

POLL_S = 0.5
ANSWER_TIMEOUT_S = 3.0
_MESSAGES = {"send", "recv", "isend", "irecv", "batch_isend_irecv"}


class Lookout:
    """Answers for this rank when another one asks where everybody is; one per rank, made by all together.

    A thread answers, so that a rank answers also while its own code hangs. It looks into the store of the process
    group twice a second and costs a step nothing.

    Args:
        token: Names this run among those of the process group; the same on all ranks.

    Attributes:
        has_asked: Whether this rank lost another one and asked where everybody is.
    """

    def __init__(self, token: str) -> None:
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._doing, self._thread_id = "start", threading.get_ident()
        self.has_asked = False
        self._closed = threading.Event()
        self._store: Any = None
        if self._world_size > 1:
            self._store = PrefixStore(f"whereabouts-{token}", _default_store())
            threading.Thread(target=self._watch, name="lookout", daemon=True).start()

    def doing(self, what: str) -> None:
        """Note what the loop does now."""
        self._doing = what

    def ask(self, error: BaseException) -> tuple[Whereabouts, ...]:
        """Ask all ranks where they are; `error` is what this rank gave up with."""
        self.has_asked = True
        if self._store is None:
            return ()
        self._closed.set()
        here = self._here(traceback.extract_tb(error.__traceback__), has_lost=True)
        try:
            self._answer(here)
            self._store.set("asked", b"1")
            return self._collect(time.monotonic() + ANSWER_TIMEOUT_S)
        except RuntimeError:  # the process that kept the store is gone
            return (here,)

    def close(self) -> None:
        """End the thread."""
        self._closed.set()

    def _watch(self) -> None:
        give_way()
        try:
            while not self._closed.wait(POLL_S):
                if self._store.check(["asked"]):
                    frame = sys._current_frames().get(self._thread_id)
                    self._answer(self._here(traceback.extract_stack(frame), has_lost=False))
                    return
        except RuntimeError:
            return  # the store went away with its process: nobody can ask

    def _here(self, stack: traceback.StackSummary, *, has_lost: bool) -> Whereabouts:
        collective, waits = last_collective()
        if _is_message(stack):  # gloo's recorder knows nothing of what the stages of a pipeline send
            collective, waits = f"a send or receive after {collective or 'the start'}", True
        # A collective that failed may be retired like one that is done.
        return Whereabouts(self._rank, self._doing, collective, waits or has_lost, _own_line(stack))

    def _answer(self, here: Whereabouts) -> None:
        self._store.set(f"rank{self._rank}", json.dumps(asdict(here)))

    def _collect(self, deadline: float) -> tuple[Whereabouts, ...]:
        keys = [f"rank{rank}" for rank in range(self._world_size)]
        while not self._store.check(keys) and time.monotonic() < deadline:
            time.sleep(POLL_S / 5)
        return tuple(
            Whereabouts(**json.loads(self._store.get(key)))
            if self._store.check([key])
            else Whereabouts(rank, None)
            for rank, key in enumerate(keys)
        )


@contextmanager
def watched(lookout: Lookout) -> Iterator[None]:
    """Turn the loss of another rank into an error that says where all of them are.

    Raises:
        RanksMissingError: Another rank did not come in time, or went away.
    """
    try:
        yield
    except RanksMissingError:
        raise
    except Exception as error:
        if not is_lost_peer(error):
            raise
        raise RanksMissingError(str(error), lookout.ask(error)) from error


def last_collective() -> tuple[str | None, bool]:
    """Describe the last collective of this process, from torch's flight recorders, and say whether it still waits.

    None: the recorders have nothing.
    """
    from torch._C import _distributed_c10d as c10d

    found: list[tuple[int, str, bool]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's, and NCCL's where there is one
        dump = getattr(c10d, name, None)
        recorded: dict[str, Any] = json.loads(dump()) if dump is not None else {}
        if entries := recorded.get("entries"):
            last = entries[-1]
            # What gloo has done is retired, and its state stays "scheduled".
            waits = not last["retired"] and last["state"] != "completed"
            found.append((last["time_created_ns"], _describe(last, recorded.get("pg_config", {})), waits))
    return max(found)[1:] if found else (None, False)


def _describe(entry: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    name = str(entry["profiling_name"]).partition(":")[2] or entry["profiling_name"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    group, description = entry["process_group"]
    ranks = groups.get(group, {}).get("ranks")
    known = description if description not in ("", "undefined", "default_pg") else group
    return f"{name} {number} of group {known}" + (f" {ranks}" if ranks and ranks != "[]" else "")


def _default_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    # A connection of its own: a rank that waits for a key must not keep the thread from answering.
    return store.clone() if hasattr(store, "clone") else store


def _is_message(stack: traceback.StackSummary) -> bool:
    """Say whether a rank waits for a neighbour in the pipeline, by where it is in torch."""
    return bool(stack) and ("/torch/distributed/pipelining/" in stack[-1].filename or stack[-1].name in _MESSAGES)


def _own_line(stack: traceback.StackSummary) -> str | None:
    own = [frame for frame in stack if "/torch/" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else None
