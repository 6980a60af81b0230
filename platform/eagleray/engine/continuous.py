"""Prepared items in a decoding session: parts of long texts, partial answers, and an item that fails alone."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from eagleray.engine.decoder import DecodingSession
from eagleray.engine.items import ItemError, Prepared
from eagleray.engine.options import DecodingOptions
from eagleray.engine.work import Ended, Entering
from eagleray.tasks.base import Answer, Features, Processor

logger = logging.getLogger(__name__)

Answered = Answer | ItemError


@runtime_checkable
class Decodes(Protocol):
    """A task whose answers are decoded from tokens, one after the other."""

    def source_tokens(self, features: Features) -> Sequence[int]:
        """Return the tokens that the model reads."""
        ...

    def decoding(self, processor: Processor, options: Mapping[str, Any]) -> DecodingOptions:
        """Return how a request's options have it decoded."""
        ...

    def decoded(self, tokens: Sequence[int], processor: Processor) -> Answer:
        """Return the answer that generated tokens stand for."""
        ...

    def partly_decoded(self, tokens: Sequence[int], processor: Processor) -> Answer | None:
        """Return what can be shown of an answer whose first tokens are known; None: nothing yet."""
        ...


@dataclass(slots=True)
class _Open:
    """An item in work."""

    entering: Entering[Prepared]
    tickets: list[int] = field(default_factory=list)
    answers: list[Answer | None] = field(default_factory=list)
    told: Answered | None = None


class ItemSession:
    """Decodes prepared items step by step; items enter and leave between the steps.

    Args:
        open_session: Opens a decoding session; again after one that failed.
        task: What the items belong to.
        processor: Its processor.
        start_token_id: What stands in front of every answer's tokens.
        join: Puts the answers to the parts of an item together.
        run: Answers items as batches: those of a session that failed, where only the one at fault may fail.
    """

    def __init__(
        self,
        open_session: Callable[[], DecodingSession],
        task: Decodes,
        processor: Processor,
        start_token_id: int,
        join: Callable[[Prepared, Sequence[Answered | None]], Answered],
        run: Callable[[Sequence[Prepared]], Sequence[Answered]],
    ) -> None:
        self._open_session, self._task, self._processor = open_session, task, processor
        self._start, self._join, self._run = start_token_id, join, run
        self._session = open_session()
        self._items: dict[int, _Open] = {}
        self._tickets: dict[int, tuple[int, int]] = {}  # ticket: key of the item, number of the part

    @property
    def is_idle(self) -> bool:
        """Whether nothing is in work."""
        return not self._items

    def add(self, entering: Entering[Prepared]) -> None:
        """Let an item in."""
        item = self._items[entering.key] = _Open(entering)
        for number, features in enumerate(entering.item.features):
            ticket = self._session.add(self._task.source_tokens(features), at_once=entering.at_once)
            self._tickets[ticket] = (entering.key, number)
            item.tickets.append(ticket)
            item.answers.append(None)

    def drop(self, keys: Collection[int]) -> None:
        """Let go of items in work."""
        tickets = {ticket for key in keys for ticket in self._items.pop(key).tickets}
        for ticket in tickets:
            self._tickets.pop(ticket, None)
        self._session.drop(tickets)

    def step(self) -> list[Ended[Answered]]:
        """Give every running row one more token; return the items that ended."""
        try:
            with torch.inference_mode():
                decoded = self._session.step()
            ended = [self._tickets.pop(row.ticket) for row in decoded]
            for (key, part), row in zip(ended, decoded, strict=True):
                self._items[key].answers[part] = self._task.decoded([self._start, *row.tokens], self._processor)
        except Exception:
            return self._fail()
        self._tell()
        return [self._close(key) for key in dict.fromkeys(key for key, _ in ended) if self._is_whole(key)]

    def _is_whole(self, key: int) -> bool:
        return all(answer is not None for answer in self._items[key].answers)

    def _close(self, key: int) -> Ended[Answered]:
        item = self._items.pop(key)
        return Ended(key, self._join(item.entering.item, item.answers))

    def _tell(self) -> None:
        """Show the answers that grow to those who wish to see them."""
        for item in self._items.values():
            if item.entering.on_partial is None:
                continue
            answer = self._so_far(item)
            if answer is not None and answer != item.told:  # some tokens add nothing that can be seen
                item.told = answer
                item.entering.on_partial(answer)

    def _so_far(self, item: _Open) -> Answered | None:
        known: list[Answered | None] = []
        for ticket, answer in zip(item.tickets, item.answers, strict=True):
            if answer is None:
                tokens = self._session.tokens_so_far(ticket)
                answer = None if tokens is None else self._shown(tokens)
            if answer is None:
                break
            known.append(answer)
        return self._join(item.entering.item, known) if known else None

    def _shown(self, tokens: Sequence[int]) -> Answer | None:
        return self._task.partly_decoded([self._start, *tokens], self._processor)

    def _fail(self) -> list[Ended[Answered]]:
        """Answer what was in work in batches, which find the item at fault, and begin anew."""
        logger.exception("a decoding session failed; its %d items are answered in batches", len(self._items))
        items, self._items, self._tickets = self._items, {}, {}
        self._session = self._open_session()
        answers = self._run([item.entering.item for item in items.values()])
        return [Ended(key, answer) for key, answer in zip(items, answers, strict=True)]
