"""Beam search as transformers does it: the same hypotheses, the same scores, the same end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from eagleray.engine.decoder.rules import DecodingRules

UNREACHABLE = -1.0e9
"""Score of the beams that a row starts without."""


class Candidate(NamedTuple):
    """A beam and the token that may follow it, with the log-probability of both."""

    score: float
    beam: int
    token: int


@dataclass(slots=True)
class BeamRow:
    """A row that runs: its open hypotheses and the best ones that have ended.

    Attributes:
        ticket: Whose it is.
        rules: How it is decoded.
        beams: Tokens of each open hypothesis, best first.
        scores: Log-probability of each.
        ended: Best hypotheses that have ended, best first: score by length, tokens.
        is_done: Whether none of the open ones can become one of the best.
    """

    ticket: int
    rules: DecodingRules
    beams: list[list[int]] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    ended: list[tuple[float, list[int]]] = field(default_factory=list)
    is_done: bool = False

    def __post_init__(self) -> None:
        self.beams = [[] for _ in range(self.rules.num_beams)]
        # All beams are alike at first: only one of them counts.
        self.scores = [0.0] + [UNREACHABLE] * (self.rules.num_beams - 1)

    @property
    def age(self) -> int:
        """Tokens that each open hypothesis has."""
        return len(self.beams[0])

    def so_far(self) -> list[int]:
        """Return the best open hypothesis."""
        return list(self.beams[0])

    def best(self) -> list[int]:
        """Return the answer."""
        return self.ended[0][1]

    def advance(self, candidates: Sequence[Candidate]) -> tuple[list[int], list[int]]:
        """Choose among the continuations.

        Args:
            candidates: The best ones, best first; more than enough for a full beam of which none has ended.

        Returns:
            The parent and the last token of each beam from now on.
        """
        rules, num_beams, is_last = self.rules, self.rules.num_beams, self.rules.is_last(self.age)
        length = self.age + 1
        penalty = length**rules.length_penalty
        going, ending = [], []
        for place, candidate in enumerate(candidates):
            if not is_last and candidate.token not in rules.eos_token_ids:
                going.append(candidate)
            elif place < num_beams:
                ending.append((candidate.score / penalty, [*self.beams[candidate.beam], candidate.token]))
        self.ended = sorted([*self.ended, *ending], key=lambda end: -end[0])[:num_beams]
        going = (going or list(candidates))[:num_beams]
        self.beams = [[*self.beams[beam], token] for _, beam, token in going]
        self.scores = [score for score, _, _ in going]
        self.is_done = is_last or self._is_settled(length)
        return [beam for _, beam, _ in going], [token for _, _, token in going]

    def _is_settled(self, length: int) -> bool:
        rules = self.rules
        if len(self.ended) < rules.num_beams:
            return False
        if rules.early_stopping is True:
            return True
        if rules.early_stopping == "never" and rules.length_penalty > 0:
            length = rules.max_new_tokens
        return bool(self.scores[0] / length**rules.length_penalty <= self.ended[-1][0])


class BeamSearch:
    """Chooses the next tokens of every row's beams.

    Args:
        rules: What may be chosen.
    """

    def __init__(self, rules: DecodingRules) -> None:
        self._rules = rules
        # Of so many continuations, enough do not end even if every beam ends in every way.
        self._num_candidates = max(2, 1 + len(rules.eos_token_ids)) * rules.num_beams

    def open(self, ticket: int) -> BeamRow:
        """Return a row that has generated nothing."""
        return BeamRow(ticket, self._rules)

    def choose(self, scores_NV: Tensor, rows: Sequence[BeamRow]) -> tuple[Tensor, Tensor]:
        """Advance the rows; return new tokens, shape (N,), and the beams that they continue, shape (R, K)."""
        found = self._candidates(scores_NV, rows)
        chosen = [row.advance(candidates) for row, candidates in zip(rows, found, strict=True)]
        parents_RK = torch.tensor([parents for parents, _ in chosen], device=scores_NV.device)
        tokens_N = torch.tensor([token for _, tokens in chosen for token in tokens], device=scores_NV.device)
        return tokens_N, parents_RK

    def _candidates(self, scores_NV: Tensor, rows: Sequence[BeamRow]) -> list[list[Candidate]]:
        """Return the best continuations of each row, best first."""
        num_rows, num_beams, wanted = len(rows), self._rules.num_beams, self._num_candidates
        so_far_RK = torch.tensor([row.scores for row in rows], device=scores_NV.device)
        logits_RKV = self._log_probabilities(scores_NV.view(num_rows, num_beams, -1), [row.age for row in rows])
        # The best of all beams are among the best of each beam.
        each = min(wanted, logits_RKV.shape[-1])
        scores_RKW, tokens_RKW = logits_RKV.topk(each)
        scores, places = (scores_RKW + so_far_RK[:, :, None]).flatten(1).topk(min(wanted, num_beams * each))
        tokens = tokens_RKW.flatten(1).gather(1, places)
        beams = places // each
        columns = zip(scores.tolist(), beams.tolist(), tokens.tolist(), strict=True)
        return [[*map(Candidate, *row)] for row in columns]

    def _log_probabilities(self, logits_RKV: Tensor, ages: Sequence[int]) -> Tensor:
        if not self._rules.renormalize:
            logits_RKV = logits_RKV.log_softmax(-1)
        self._rules.restrict(logits_RKV, ages)
        return logits_RKV.log_softmax(-1) if self._rules.renormalize else logits_RKV
