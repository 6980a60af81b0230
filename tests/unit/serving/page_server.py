"""A server for the page: the real edge and the real routes of each model, joined as a front joins them; no Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from serving_fakes import DIGITS, EN_FR, LANGID, OWN, FakeAnswerer, FakeFleet, GrowingAnswerer, service
from starlette.types import ASGIApp, Receive, Scope, Send

from eagleray_serving.answering import Asking
from eagleray_serving.catalog import ModelCard
from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.metrics import Metrics
from eagleray_serving.protection import Protection
from eagleray_serving.schema import WireError

LIMITS = {"max_items": 10_000, "max_item_characters": 120, "request_timeout_s": 60.0}
SCORES = {
    "exact_match": 0.9875,
    "exact_match/date": 1.0,
    "exact_match/unit": 0.9,
    "chrf": 98.71,
    "chrf/date": 99.5,
}
LANGUAGES = ("de", "en", "es", "fr", "it", "nl", "pl", "pt", "ro", "sv", "tr", "uk")
TRANSLATOR = replace(EN_FR, limits=LIMITS, scores=SCORES)
CLASSIFIER = replace(LANGID, limits=LIMITS, labels=LANGUAGES)
READER = replace(DIGITS, limits=LIMITS, labels=tuple("0123456789"))
OTHER = replace(OWN, limits=LIMITS, columns=("left", "right"))
# As `views.view` shows a canary.
ROLLOUT = {
    "current": TRANSLATOR.version,
    "previous": None,
    "follow": "production",
    "canary": {"version": "r2-step-00000400", "percent": 10},
    "loading": None,
    "refused": {"what": "refused", "version": "r1-step-00000900", "reason": "chrf is lower"},
    "requests": {"r2-step-00000400": {"requests": 12, "errors": 1, "p50_ms": 18.5, "p95_ms": 40}},
    "scores": TRANSLATOR.scores,
}


def guess(value: Any) -> dict[str, Any]:
    rest = 0.28 / (len(LANGUAGES) - 2)
    return classified({**dict.fromkeys(LANGUAGES, rest), "fr": 0.61, "en": 0.11})


def seven(value: Any) -> dict[str, Any]:
    assert isinstance(value, bytes)
    return classified({**dict.fromkeys("0123456789", 0.01), "7": 0.91})


def classified(scores: Mapping[str, float]) -> dict[str, Any]:
    label = max(scores, key=scores.__getitem__)
    return {"label": label, "score": scores[label], "scores": scores}


class BusyAnswerer(GrowingAnswerer):
    """Refuses as often as it is told to, then translates."""

    num_refusals = 0

    async def stream(self, item: Mapping[str, Any], options: Mapping[str, Any], asking: Asking) -> Any:
        if self.num_refusals:
            self.num_refusals -= 1
            raise WireError(429, "overloaded", "65536 tokens are waiting", "try again soon", retry_after_s=1)
        async for answers in super().stream(item, options, asking):
            yield answers


class PageServer:
    """What the tests of the page talk to.

    Args:
        keys: File of keys; None: nobody is asked for one.
        pause_s: Seconds between two words of a translation.
    """

    def __init__(self, keys: str | None = None, pause_s: float = 0.0) -> None:
        self.translator = BusyAnswerer(pause_s=pause_s)
        answerers: Sequence[tuple[ModelCard, Any, Sequence[str]]] = (
            (TRANSLATOR, self.translator, ("text",)),
            (CLASSIFIER, FakeAnswerer(guess, version=CLASSIFIER.version), ("text",)),
            (READER, FakeAnswerer(seven, version=READER.version), ("image",)),
            (OTHER, FakeAnswerer(lambda value: {"echo": value}, version=OTHER.version), ("left", "right")),
        )
        gate = Gate(Protection(keys=keys))
        services = {card.name: service(card, answerer, columns, **LIMITS) for card, answerer, columns in answerers}
        for each in services.values():
            each.gate = gate
        self._models: dict[str, ASGIApp] = {
            card.path: services[card.name].application() for card, _, _ in answerers
        }
        cards = [card for card, _, _ in answerers]
        self._edge = Edge(
            cards,
            FakeFleet(services),
            max_body_bytes=10**6,
            body_timeout_s=5,
            gate=gate,
            versions=lambda: {EN_FR.name: ROLLOUT},
        )
        self._queue = Metrics()
        self._queue.watch_queue(lambda: 340)
        self._application = self._edge.application()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._edge.reports.take("en-fr", "one", self._queue.families())  # as its replica does every two seconds
        await self._models.get(scope["path"], self._application)(scope, receive, send)
