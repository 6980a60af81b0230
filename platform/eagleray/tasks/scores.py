"""Scores of answers against references."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from importlib.util import find_spec

from eagleray.tasks.base import Answer, Example

Scorer = Callable[[Sequence[str], Sequence[str]], dict[str, float]]
"""(predictions, references) -> scores by name."""


def exact_match(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that equal their reference."""
    return sum(p == r for p, r in zip(predictions, references, strict=True)) / max(len(references), 1)


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the mean over classes of 2 TP / (2 TP + FP + FN), of all classes that occur on either side."""
    hits = Counter(p for p, r in zip(predictions, references, strict=True) if p == r)
    named = Counter(predictions)
    true = Counter(references)
    classes = named.keys() | true.keys()
    return sum(2 * hits[c] / (named[c] + true[c]) for c in classes) / max(len(classes), 1)


def score_classes(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return accuracy and macro F1."""
    return {"accuracy": exact_match(predictions, references), "macro_f1": macro_f1(predictions, references)}


def score_translations(predictions: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Return exact match, and BLEU (Papineni et al. 2002) and chrF (Popovic 2015) where sacrebleu is installed."""
    scores = {"exact_match": exact_match(predictions, references)}
    if find_spec("sacrebleu") is not None:
        from sacrebleu.metrics import BLEU, CHRF

        for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
            scores[name] = float(metric.corpus_score(list(predictions), [list(references)]).score)
    return scores


def sacrebleu_signatures() -> dict[str, str]:
    """Return sacrebleu's signatures of BLEU and chrF, or nothing where it is not installed."""
    if find_spec("sacrebleu") is None:
        return {}
    from sacrebleu.metrics import BLEU, CHRF

    signatures = {}
    for name, metric in (("bleu", BLEU()), ("chrf", CHRF())):
        metric.corpus_score(["a"], [["a"]])  # a signature knows the number of references only after a score
        signatures[name] = str(metric.get_signature())
    return signatures


def score_by_kind(
    scorer: Scorer,
    answers: Sequence[Answer],
    examples: Sequence[Example],
    *,
    answer_key: str,
    references: Sequence[str],
) -> dict[str, float]:
    """Score all answers, and those of each `kind` under `<metric>/<kind>`.

    Args:
        scorer: Computes the scores of one group.
        answers: One per example; one that lacks `answer_key` (an item that failed) counts as the empty text.
        examples: Rows, some with a column `kind`.
        answer_key: Where an answer holds its prediction.
        references: The truth, one per example.
    """
    predictions = [str(answer.get(answer_key, "")) for answer in answers]
    scores = scorer(predictions, references) if references else {}
    groups: dict[str, list[int]] = defaultdict(list)
    for i, example in enumerate(examples):
        if example.get("kind") is not None:
            groups[str(example["kind"])].append(i)
    for kind in sorted(groups):
        rows = groups[kind]
        part = scorer([predictions[i] for i in rows], [references[i] for i in rows])
        scores |= {f"{name}/{kind}": value for name, value in part.items()}
    return scores
