"""What a score is worth: the scores of answers that need no training, or next to none."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from math import log

from eagleray.tasks.base import Answer, Example, Task

NGRAM_SIZES = (1, 2, 3, 4)
MAX_TRAINING_EXAMPLES = 50_000


def baselines(task: Task, training: Iterable[Example], examples: Sequence[Example]) -> dict[str, dict[str, float]]:
    """Return the scores of every baseline that fits a task, by its name.

    Args:
        task: The task; its route says what the baselines may know.
        training: Training examples, read at most once.
        examples: The examples that are scored.
    """
    if task.route == "translate":
        return {"copy the input": task.score([{"text": example["source"]} for example in examples], examples)}
    if task.columns == ("text", "label"):
        classifier = NgramClassifier()
        classifier.fit((str(example["text"]), str(example["label"])) for example in training)
        answers: list[Answer] = [{"label": classifier.predict(str(example["text"]))} for example in examples]
        return {"character n-grams": task.score(answers, examples)}
    return {}


class NgramClassifier:
    """Naive Bayes over character n-grams (after Cavnar and Trenkle 1994), with add-one smoothing."""

    def __init__(self) -> None:
        self._counts: dict[str, Counter[str]] = defaultdict(Counter)
        self._num_ngrams: dict[str, int] = {}
        self._num_kinds = 0

    def fit(self, rows: Iterable[tuple[str, str]]) -> None:
        """Count the n-grams of texts and labels, of the first `MAX_TRAINING_EXAMPLES` rows."""
        for _, (text, label) in zip(range(MAX_TRAINING_EXAMPLES), rows, strict=False):
            self._counts[label].update(_ngrams(text))
        self._num_ngrams = {label: counts.total() for label, counts in self._counts.items()}
        self._num_kinds = len(set().union(*self._counts.values()))

    def predict(self, text: str) -> str:
        """Return the most likely label."""
        ngrams = list(_ngrams(text))
        likelihood: Callable[[str], float] = lambda label: self._log_likelihood(ngrams, label)  # noqa: E731
        return max(sorted(self._counts), key=likelihood)

    def _log_likelihood(self, ngrams: Sequence[str], label: str) -> float:
        counts = self._counts[label]
        total = sum(log(counts[ngram] + 1) for ngram in ngrams)
        return total - len(ngrams) * log(self._num_ngrams[label] + self._num_kinds)


def _ngrams(text: str) -> Iterator[str]:
    padded = f" {text} "
    for size in NGRAM_SIZES:
        for start in range(len(padded) - size + 1):
            yield padded[start : start + size]
