"""Taking a run: one owner at a time, and a new one when the old one is gone."""

from __future__ import annotations

import json
import secrets
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from eagleray.config.schema import RunConfig
from eagleray.errors import AlreadyExistsError, NotFoundError, OwnerAliveError, RunChangedError, StoreError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.code import hash_code
from eagleray.store.decide import AlreadyFinished, Contents, Continue, Outcome, Refuse, RunState, Start, decide
from eagleray.store.environment import environment_versions
from eagleray.store.objects import ObjectStore
from eagleray.store.owner import DEFAULT_TIMING, Owner, Timing, beat_key, is_alive
from eagleray.store.records import create_record, read_record, write_record
from eagleray.store.runs import RunHandle, epoch_key, highest_epoch, request_stop, run_key, run_numbers
from eagleray.store.versions import latest_version

Notify = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Finished:
    """The run was finished before: there is nothing to do.

    Attributes:
        name: The model's name.
        run: The run's number.
        ref: Reference of its last version; None: it committed none.
        report: What its owner reported.
    """

    name: str
    run: int
    ref: str | None
    report: Mapping[str, Any]


class RunClaim:
    """A run that this process owns, until `finish` or `close`. A context manager.

    Attributes:
        handle: What the workers need.
        resume: The checkpoint to go on from; None: the run begins.
    """

    def __init__(
        self, handle: RunHandle, resume: Checkpoint | None, *, timing: Timing = DEFAULT_TIMING, notify: Notify
    ) -> None:
        self.handle = handle
        self.resume = resume
        self._timing = timing
        self._notify = notify
        self._is_ended = False
        self._end = threading.Event()
        self._fenced = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._keep_beating, name="beat", daemon=True)
        self._thread.start()

    def __enter__(self) -> RunClaim:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def is_fenced(self) -> bool:
        """Whether somebody else took the run over, as far as the last beat knows."""
        return self._fenced.is_set()

    def request_stop(self) -> None:
        """Ask the workers to commit and stop."""
        request_stop(self.handle)

    def finish(self, outcome: Outcome, report: Mapping[str, Any]) -> None:
        """Record how this ownership ended, and give the run up.

        Args:
            outcome: Only `FINISHED` keeps the next `train` from going on.
            report: For the user and for the next call.
        """
        self._stop_beating()
        if self._is_ended:
            return
        handle = self.handle
        record = {"outcome": str(outcome), "report": dict(report)}
        create_record(handle.store, epoch_key(handle.name, handle.run, handle.epoch, ".end"), record)
        self._is_ended = True

    def close(self) -> None:
        """Give the run up; as failed, unless it was finished."""
        self.finish(Outcome.FAILED, {})

    def _keep_beating(self) -> None:
        is_failing = False
        while not self._end.wait(self._timing.beat_s):
            try:
                if (highest_epoch(self.handle.store, self.handle.name, self.handle.run) or 0) > self.handle.epoch:
                    self._fenced.set()
                    return
                self._beat()
                is_failing = False
            except StoreError as error:
                if not is_failing:
                    self._notify(f"The run's beat could not be renewed: {error}")
                is_failing = True

    def _beat(self) -> None:
        handle = self.handle
        write_record(handle.store, beat_key(handle.name, handle.run), {"epoch": handle.epoch})

    def _stop_beating(self) -> None:
        self._end.set()
        self._thread.join(2 * self._timing.beat_s)


def claim_run(
    store: ObjectStore,
    config: RunConfig,
    *,
    new_run: bool = False,
    hash_contents: Callable[[], Contents] | None = None,
    notify: Notify,
    timing: Timing = DEFAULT_TIMING,
) -> RunClaim | Finished:
    """Take the run that the file asks for: a new one, or the newest one to go on with.

    Args:
        store: The store.
        config: The file.
        new_run: Begin a new run although the name has one.
        hash_contents: Reads what the file names by its place (data, a pretrained model), so that it may lie
            elsewhere than before; not called for a finished run. None: the places are compared.
        notify: Told what the user should know: that a run goes on, that an owner is being watched.
        timing: Of beats and watches.

    Raises:
        RunChangedError: The name holds a run of another file.
        OwnerAliveError: Somebody else is training this name.
        CheckpointDamagedError: The checkpoint to go on from is damaged.
    """
    name, wanted = config.name, config.model_dump(mode="json")
    state = read_state(store, name)
    decision = decide(state, wanted, new_run=new_run)
    record: dict[str, Any] = {"config": wanted}
    if hash_contents is not None and not isinstance(decision, AlreadyFinished):
        contents = hash_contents()
        record |= {"data_sha256": contents.data, "pretrained_sha256": contents.pretrained}
        decision = decide(state, wanted, new_run=new_run, contents=contents)
    record["code_sha256"] = hash_code(config.code)
    match decision:
        case Refuse():
            raise _changed(name, decision)
        case AlreadyFinished(run):
            return _finished(store, name, run)
        case Start(run):
            if state is not None:
                _supersede(store, name, state.run, timing, notify)
            _create_run(store, name, run, wanted)
        case Continue(run):
            _tell(name, decision, notify)
            _tell_of_code(name, state, record["code_sha256"], notify)
    epoch = _take(store, name, run, record, timing, notify)
    handle = RunHandle(store, name, run, epoch, secrets.token_hex(4), record["code_sha256"])
    claim = RunClaim(handle, None, timing=timing, notify=notify)
    try:
        version = latest_version(store, name, run)
        claim.resume = None if version is None else Checkpoint.open(store, name, version)
    except BaseException:
        claim.close()
        raise
    return claim


def read_state(store: ObjectStore, name: str) -> RunState | None:
    """What the store says of the newest run of a name."""
    run = max(run_numbers(store, name), default=None)
    if run is None:
        return None
    epoch = highest_epoch(store, name, run)
    # An owner that died between the run's record and its own left a run that nobody took.
    record = read_record(store, epoch_key(name, run, epoch) if epoch else run_key(name, run))
    end = _end_record(store, name, run, epoch) if epoch else None
    return RunState(
        run,
        _with_defaults(record.get("config", {})),
        Outcome(end["outcome"]) if end else None,
        Contents(record.get("data_sha256"), record.get("pretrained_sha256")),
        record.get("code_sha256"),
    )


def _take(
    store: ObjectStore, name: str, run: int, record: Mapping[str, Any], timing: Timing, notify: Notify
) -> int:
    """Become the owner: see that the last one is gone, then be the first to write the next epoch."""
    last = highest_epoch(store, name, run)
    if last is not None and _end_record(store, name, run, last) is None:
        owner = _owner(store, name, run, last)
        if is_alive(store, name, run, last, owner, timing=timing, notify=notify):
            raise _owned(name, run, owner)
        notify(f"{owner} is gone; taking over run r{run} of {name}.")
    epoch = (last or 0) + 1
    values = {**record, "owner": Owner.this_process().to_record(), "environment": environment_versions()}
    try:
        create_record(store, epoch_key(name, run, epoch), values)
    except AlreadyExistsError:
        raise _owned(name, run, _owner(store, name, run, epoch)) from None
    return epoch


def _create_run(store: ObjectStore, name: str, run: int, config: Mapping[str, Any]) -> None:
    values = {"name": name, "run": run, "config": config, "environment": environment_versions()}
    try:
        create_record(store, run_key(name, run), values)
    except AlreadyExistsError:
        epoch = highest_epoch(store, name, run)
        if epoch is None:
            raise OwnerAliveError(f"somebody else is just beginning run r{run} of {name}") from None
        raise _owned(name, run, _owner(store, name, run, epoch)) from None


def _supersede(store: ObjectStore, name: str, run: int, timing: Timing, notify: Notify) -> None:
    """Take the older run, if its owner did not end it, so that a revenant of it cannot commit."""
    last = highest_epoch(store, name, run)
    if last is None or _end_record(store, name, run, last) is not None:
        return
    config = read_record(store, epoch_key(name, run, last)).get("config", {})
    epoch = _take(store, name, run, {"config": config}, timing, notify)
    create_record(store, epoch_key(name, run, epoch, ".end"), {"outcome": Outcome.SUPERSEDED, "report": {}})


def _finished(store: ObjectStore, name: str, run: int) -> Finished:
    epoch = highest_epoch(store, name, run)
    end = _end_record(store, name, run, epoch) if epoch else None
    version = latest_version(store, name, run)
    return Finished(name, run, f"{name}@{version}" if version else None, end["report"] if end else {})


def _end_record(store: ObjectStore, name: str, run: int, epoch: int) -> dict[str, Any] | None:
    with suppress(NotFoundError):
        return read_record(store, epoch_key(name, run, epoch, ".end"))
    return None


def _owner(store: ObjectStore, name: str, run: int, epoch: int) -> Owner:
    return Owner.from_record(read_record(store, epoch_key(name, run, epoch))["owner"])


def _with_defaults(config: dict[str, Any]) -> dict[str, Any]:
    """A file of an older release lacks the keys that are new: their defaults are what it ran with."""
    try:
        return RunConfig.model_validate_json(json.dumps(config)).model_dump(mode="json")
    except ValidationError:
        return config


def _tell(name: str, decision: Continue, notify: Notify) -> None:
    notify(f"Run r{decision.run} of {name} goes on.")
    if decision.stretched is not None:
        key, old, new = decision.stretched
        notify(f"{key} was raised from {old} to {new}: the learning-rate schedule is stretched to the new length.")


def _tell_of_code(name: str, state: RunState | None, code_sha256: str | None, notify: Notify) -> None:
    """Say that the user's code is not what the run was trained with so far: it may change the result."""
    before = state.code_sha256 if state is not None else None
    if before is not None and before != code_sha256:
        now = code_sha256[:12] if code_sha256 is not None else "nothing"
        notify(
            f"warning: the Python files under `code:` changed since {name} was trained last "
            f"(content {before[:12]} -> {now}); the run goes on with the new ones."
        )


def _owned(name: str, run: int, owner: Owner) -> OwnerAliveError:
    return OwnerAliveError(
        f"run r{run} of {name} belongs to {owner}, which is alive",
        hint="Wait for it or stop it; or train under another name.",
    )


def _changed(name: str, decision: Refuse) -> RunChangedError:
    changes = "\n".join(f"  {key}: {old!r} -> {new!r}" for key, (old, new) in decision.changes.items())
    return RunChangedError(
        f"run r{decision.run} of {name} was made by a different file:\n{changes}",
        hint="Undo the changes to go on with it, give --new-run to begin a new one, or choose another name.",
    )
