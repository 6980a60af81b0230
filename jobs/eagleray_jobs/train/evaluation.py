"""Scores of the validation split, computed by all workers."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from eagleray.errors import EaglerayError, RunFailedError
from eagleray.parallel import DataCoordinate
from eagleray.tasks.base import Answer, Example, Processor, Task, move
from eagleray_jobs.train.batches import Rows
from eagleray_jobs.train.exchange import Exchange
from eagleray_jobs.train.step import seed_step


class ScoredRows(Rows, Protocol):
    """Prepared rows that still know the example they were made from."""

    def example(self, index: int) -> Example:
        """Return the example of a row, under the task's columns."""
        ...


class Evaluator:
    """Answers and scores a split.

    Rows are sorted by length and dealt to the ranks in turn, so that every rank gets the same work and its
    batches have little padding. The answers meet on rank 0, which scores them in the split's order: the
    scores do not depend on the number of workers.

    Args:
        task: Answers and scores.
        processor: Of the task.
        rows: The split.
        exchange: Carries the answers and the scores.
        coordinate: Which part this rank answers.
        device: Where this rank computes.
        batch_size: Most rows in one batch.
        max_examples: Rows that are scored, spread evenly over the split; None: all.
        seed: Of whatever the model draws while it answers.
    """

    def __init__(
        self,
        task: Task,
        processor: Processor,
        rows: ScoredRows,
        exchange: Exchange,
        coordinate: DataCoordinate,
        device: torch.device,
        *,
        batch_size: int,
        max_examples: int | None,
        seed: int,
    ) -> None:
        self._task = task
        self._processor = processor
        self._rows = rows
        self._exchange = exchange
        self._coordinate = coordinate
        self._device = device
        self._batch_size = batch_size
        self._seed = seed
        self._indices = choose_evenly(len(rows), max_examples)

    def run(self, module: nn.Module, step: int) -> dict[str, float]:
        """Return the scores of `module`, with its `loss`; the same on every rank.

        Raises:
            RunFailedError: The task could not score the answers.
        """
        own = deal(self._indices, self._rows.lengths[self._indices], self._coordinate)
        seed_step(self._seed, step, 0, self._coordinate.rank)
        was_training = module.training
        module.eval()
        with torch.no_grad():  # not inference_mode: what a model caches must stay usable in training
            answers, loss, count = self._answer(module, own)
        module.train(was_training)
        loss, count = self._exchange.sum([loss, count])
        pairs = list(zip(own.tolist(), answers, strict=True)) if self._coordinate.counts else []
        scores = self._score(self._exchange.collect(pairs))
        return {"loss": loss / max(count, 1.0)} | scores

    def _answer(self, module: nn.Module, own: NDArray[np.int64]) -> tuple[list[Answer], float, float]:
        answers: list[Answer] = []
        loss_sum, count = 0.0, 0.0
        for start in range(0, len(own), self._batch_size):
            rows = [self._rows[int(index)] for index in own[start : start + self._batch_size]]
            batch = move(self._task.collate(rows, self._processor), self._device)
            loss = self._task.loss(module, batch)
            answered = self._task.predict(module, batch, self._processor, {})
            if len(answered) != len(rows):
                raise RunFailedError(
                    f"{type(self._task).__name__}.predict gave {len(answered)} answers for {len(rows)} rows",
                    "it must return one answer for each row of the batch, in order",
                )
            answers += answered
            loss_sum += float(loss.total)
            count += float(loss.count)
        return (answers, loss_sum, count) if self._coordinate.counts else (answers, 0.0, 0.0)

    def _score(self, gathered: list[list[tuple[int, Answer]]] | None) -> dict[str, float]:
        """Score on rank 0; its failure reaches every rank, since all of them wait for the scores."""
        here = None if gathered is None else self._score_here(gathered)
        scores: dict[str, float] | EaglerayError = self._exchange.broadcast(here)
        if isinstance(scores, EaglerayError):
            raise scores
        return scores

    def _score_here(self, gathered: list[list[tuple[int, Answer]]]) -> dict[str, float] | EaglerayError:
        pairs = sorted((pair for part in gathered for pair in part), key=lambda pair: pair[0])
        examples = [self._rows.example(index) for index, _ in pairs]
        try:
            scores = self._task.score([answer for _, answer in pairs], examples)
            return {name: float(value) for name, value in scores.items()}
        except EaglerayError as error:
            return error
        except Exception as error:
            name = type(self._task).__name__
            wrapped = RunFailedError(f"{name}.score failed: {type(error).__name__}: {error}")
            wrapped.__cause__ = error
            return wrapped


def choose_evenly(num_rows: int, limit: int | None) -> NDArray[np.int64]:
    """Return at most `limit` indices spread evenly over the rows, so that no kind of row is left out."""
    count = num_rows if limit is None else min(limit, num_rows)
    return np.arange(count, dtype=np.int64) * num_rows // max(count, 1)


def deal(
    indices: NDArray[np.int64], lengths: NDArray[np.integer], coordinate: DataCoordinate
) -> NDArray[np.int64]:
    """Return one rank's share of the indices, sorted by length."""
    order = np.argsort(lengths, kind="stable")
    return indices[order][coordinate.rank :: coordinate.world]
