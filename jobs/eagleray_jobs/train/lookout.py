"""When a rank no longer comes, the ranks tell each other where they are, through the store of their group."""

from __future__ import annotations

import json
import secrets
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict
from types import FrameType, TracebackType
from typing import Any

from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.whereabouts import Whereabouts

POLL_S = 0.5
ANSWER_TIMEOUT_S = 3.0


class Lookout:
    """Answers for this rank when another one asks where everybody is; one per rank, made by all together.

    A thread answers, so that a rank answers also while its own code hangs. It looks into the store of the process
    group twice a second and costs a step nothing.

    Args:
        exchange: Between the ranks.

    Attributes:
        has_asked: Whether this rank lost another one and asked where everybody is.
    """

    def __init__(self, exchange: Exchange) -> None:
        self._rank, self._world_size = exchange.rank, exchange.world_size
        self._doing, self._thread_id = "start", threading.get_ident()
        self.has_asked = False
        self._closed = threading.Event()
        self._store: Any = None
        if self._world_size > 1:
            token = exchange.broadcast(secrets.token_hex(4))
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
        here = Whereabouts(self._rank, self._doing, last_collective(), _line_of_error(error.__traceback__))
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
        try:
            while not self._closed.wait(POLL_S):
                if self._store.check(["asked"]):
                    line = _line(sys._current_frames().get(self._thread_id))
                    self._answer(Whereabouts(self._rank, self._doing, last_collective(), line))
                    return
        except RuntimeError:
            return  # the store went away with its process: nobody can ask

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


def last_collective() -> str | None:
    """Describe the last collective of this process, from torch's flight recorders; None: they have nothing."""
    from torch._C import _distributed_c10d as c10d

    found: list[tuple[int, str]] = []
    for name in ("_dump_fr_trace_json", "_dump_nccl_trace_json"):  # gloo's, and NCCL's where there is one
        dump = getattr(c10d, name, None)
        recorded: dict[str, Any] = json.loads(dump()) if dump is not None else {}
        if entries := recorded.get("entries"):
            found.append((entries[-1]["time_created_ns"], _describe(entries[-1], recorded.get("pg_config", {}))))
    return max(found)[1] if found else None


def _describe(entry: Mapping[str, Any], groups: Mapping[str, Any]) -> str:
    name = str(entry["profiling_name"]).partition(":")[2] or entry["profiling_name"]
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    group, description = entry["process_group"]
    ranks = groups.get(group, {}).get("ranks")
    known = description if description not in ("", "undefined", "default_pg") else group
    where = f"group {known}" + (f" {ranks}" if ranks and ranks != "[]" else "")
    state = "done" if entry["state"] == "completed" else "waiting"
    return f"{name} {number} of {where} ({state})"


def _default_store() -> Any:
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    # A connection of its own: a rank that waits for a key must not keep the thread from answering.
    return store.clone() if hasattr(store, "clone") else store


def _line(frame: FrameType | None) -> str | None:
    return None if frame is None else _innermost(traceback.extract_stack(frame))


def _line_of_error(trace: TracebackType | None) -> str | None:
    return _innermost(traceback.extract_tb(trace))


def _innermost(stack: traceback.StackSummary) -> str | None:
    own = [frame for frame in stack if "/torch/" not in frame.filename]
    return f"{own[-1].filename}:{own[-1].lineno} in {own[-1].name}" if own else None
