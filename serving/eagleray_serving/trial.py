"""What a new version is tried on: items that the current one has answered. They stay in this process's memory."""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from eagleray.engine import ItemError, ModelSummary
from eagleray.errors import ServingError
from eagleray_serving.answering import Answers, ItemFailure

NUM_EXAMPLES = 16
# Longer items would make a trial slow; there are shorter ones.
MAX_ITEM_CHARACTERS = 2000
# Answers to the same items may be so much longer or shorter, all together, before something is wrong with them.
MAX_LENGTH_RATIO = 3.0
SPARE_CHARACTERS = 100


@dataclass(frozen=True, slots=True)
class Recorded:
    """An item with the answer of the version that was current then."""

    item: Mapping[str, Any]
    options: Mapping[str, Any]
    answer: Mapping[str, Any]


class Recorder:
    """Keeps a handful of items that were answered last, one of a request."""

    def __init__(self) -> None:
        self._recorded: deque[Recorded] = deque(maxlen=NUM_EXAMPLES)

    def record(self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any], answers: Answers) -> None:
        """Keep the first item of a request that was answered, if it is short."""
        for item, answer in zip(items, answers.items, strict=True):
            if not isinstance(answer, ItemFailure) and _size(item) <= MAX_ITEM_CHARACTERS:
                self._recorded.append(Recorded(item, dict(options), answer))
                return

    def examples(self) -> tuple[Recorded, ...]:
        """Return what is kept now."""
        return tuple(self._recorded)


class Answering(Protocol):
    """What is tried: an engine."""

    summary: ModelSummary

    def answer(
        self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any] | None = None
    ) -> Sequence[Mapping[str, Any] | ItemError]:
        """Answer items, each for itself, in their order."""


def check_same_kind(engine: Answering, route: str, columns: Sequence[str]) -> None:
    """Refuse a version that answers other requests than the model does.

    Raises:
        ServingError: Another task.
    """
    found = engine.summary
    if (found.route, tuple(found.input_columns)) != (route, tuple(columns)):
        raise ServingError(
            f"{found.ref} answers /v1/{found.route} with {', '.join(found.input_columns)}, and this model "
            f"/v1/{route} with {', '.join(columns)}",
            "serve it under a name of its own",
        )


def try_on(engine: Answering, examples: Sequence[Recorded]) -> None:
    """Let a version answer what the current one has answered.

    Raises:
        ServingError: It fails on an item, its answers have another form or hold no numbers where there were some,
            or are altogether much longer or shorter.
    """
    ref = engine.summary.ref
    lengths, found_lengths = 0, 0
    for example in examples:
        (found,) = engine.answer([example.item], example.options)
        if isinstance(found, ItemError):
            raise ServingError(f"{ref} fails on a recorded example: {found.code}", "its server's log says more")
        if set(found) != set(example.answer):
            raise ServingError(
                f"{ref} answers a recorded example with {_keys(found)}, the current version with "
                f"{_keys(example.answer)}"
            )
        if any(not math.isfinite(number) for number in _numbers(found)):
            raise ServingError(f"{ref} answers a recorded example with a number that is not finite")
        lengths += sum(map(len, _texts(example.answer)))
        found_lengths += sum(map(len, _texts(found)))
    if (
        not lengths / MAX_LENGTH_RATIO - SPARE_CHARACTERS
        <= found_lengths
        <= lengths * MAX_LENGTH_RATIO + SPARE_CHARACTERS
    ):
        raise ServingError(
            f"{ref} answers {len(examples)} recorded examples with {found_lengths} characters, the current "
            f"version with {lengths}"
        )


def _size(item: Mapping[str, Any]) -> int:
    try:
        return sum(
            len(value) if isinstance(value, str | bytes) else len(json.dumps(value)) for value in item.values()
        )
    except (TypeError, ValueError):
        return MAX_ITEM_CHARACTERS + 1


def _keys(answer: Mapping[str, Any]) -> str:
    return ", ".join(sorted(map(str, answer)))


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for each in _inner(value):
        yield from _texts(each)


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, int | float):
        yield value
    for each in _inner(value):
        yield from _numbers(each)


def _inner(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return list(value.values())
    return list(value) if isinstance(value, list | tuple) else []
