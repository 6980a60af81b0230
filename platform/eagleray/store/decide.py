"""Whether `train` on a name that exists goes on, is done, or is refused. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class Outcome(StrEnum):
    """How an owner of a run ended."""

    FINISHED = "finished"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    SUPERSEDED = "superseded"


@dataclass(frozen=True, slots=True)
class Contents:
    """SHA-256 of what is in that which a file names by its place.

    Attributes:
        data: Of the rows; None: not known.
        pretrained: Of the checkpoint under `model.pretrained`; None: not known, or there is none.
    """

    data: str | None = None
    pretrained: str | None = None


@dataclass(frozen=True, slots=True)
class RunState:
    """What the store says of the newest run of a name.

    Attributes:
        run: Its number.
        config: The file that its last owner ran, as JSON.
        outcome: How its last owner ended; None: it did not say.
        contents: Of what its last owner trained on, as far as it was recorded.
        code_sha256: Of the user's own code that its last owner ran; None: there was none.
    """

    run: int
    config: Mapping[str, Any]
    outcome: Outcome | None
    contents: Contents = Contents()
    code_sha256: str | None = None


@dataclass(frozen=True, slots=True)
class Start:
    """A new run begins."""

    run: int


@dataclass(frozen=True, slots=True)
class Continue:
    """The newest run goes on from its latest checkpoint.

    Attributes:
        run: Its number.
        stretched: The key of its length, the old and the new value, where the run became longer.
    """

    run: int
    stretched: tuple[str, float, float] | None = None


@dataclass(frozen=True, slots=True)
class AlreadyFinished:
    """There is nothing to do."""

    run: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """The file is another one.

    Attributes:
        run: The run that it differs from.
        changes: For each key that would change the result, the value of the run and the file's.
    """

    run: int
    changes: Mapping[str, tuple[Any, Any]]


Decision = Start | Continue | AlreadyFinished | Refuse

LENGTH_KEYS = ("train.max_steps", "train.num_train_epochs")
PLACES = {
    "data": ("data.train", "data.validation", "data.test"),
    "model.pretrained": ("model.pretrained", "model.revision"),
}
"""Keys that say where something is, which differs from machine to machine: its content counts, where known."""
NEUTRAL_SECTIONS = ("parallel", "resources", "serve")
"""Sections that do not change the result of a training."""
NEUTRAL_KEYS = frozenset(
    {
        # `code` holds paths, which differ from machine to machine; the manifests hold the hash of what is in them.
        *("store", "code"),
        *("train.logging_steps", "train.eval_steps", "train.save_steps", "train.save_total_limit"),
        *("train.stop_at_step", "train.max_failures", "train.report_to", "train.ddp_timeout"),
        "train.profile_steps",
        # Micro-batches are accumulated to the same global batch.
        *("train.per_device_train_batch_size", "train.per_device_eval_batch_size"),
    }
)


def decide(
    state: RunState | None, config: Mapping[str, Any], *, new_run: bool, contents: Contents = Contents()
) -> Decision:
    """Decide what `train` does.

    Args:
        state: The newest run of the name; None: there is none.
        config: The file, as JSON.
        new_run: The user asked for a new run.
        contents: Of what the file names by its place; where it is not known, the places are compared.
    """
    if state is None or new_run:
        return Start(run=1 if state is None else state.run + 1)
    changes = _changes(state.config, config)
    _compare_contents(changes, "data", state.contents.data, contents.data)
    _compare_contents(changes, "model.pretrained", state.contents.pretrained, contents.pretrained)
    stretched = _stretched(changes)
    if stretched is not None:
        del changes[stretched[0]]
    if changes:
        return Refuse(state.run, changes)
    if state.outcome is Outcome.FINISHED and stretched is None:
        return AlreadyFinished(state.run)
    return Continue(state.run, stretched)


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    before, after = dict(_leaves(old)), dict(_leaves(new))
    keys = [key for key in sorted(before.keys() | after.keys()) if not _is_neutral(key)]
    return {key: (before.get(key), after.get(key)) for key in keys if before.get(key) != after.get(key)}


def _stretched(changes: Mapping[str, tuple[Any, Any]]) -> tuple[str, float, float] | None:
    for key in LENGTH_KEYS:
        old, new = changes.get(key, (None, None))
        if old is not None and new is not None and new > old:
            return key, old, new
    return None


def _is_neutral(key: str) -> bool:
    return key in NEUTRAL_KEYS or key.split(".", 1)[0] in NEUTRAL_SECTIONS


def _compare_contents(changes: dict[str, tuple[Any, Any]], what: str, old: str | None, new: str | None) -> None:
    """Where both contents are known, let them count instead of their places."""
    if old is None or new is None:
        return
    for key in [key for key in changes if ".".join(key.split(".")[:2]) in PLACES[what]]:
        del changes[key]
    if old != new:
        changes[what] = (f"content {old[:12]}", f"content {new[:12]}")


def _leaves(config: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    leaves: list[tuple[str, Any]] = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves += _leaves(value, f"{prefix}{key}.")
        else:
            leaves.append((f"{prefix}{key}", value))
    return leaves
