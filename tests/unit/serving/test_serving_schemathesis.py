"""Requests that schemathesis makes from our own OpenAPI document: no 5xx, and nothing that the document denies.

`make test` takes a handful of examples per operation, always the same; `make test-all` many, and new ones each
time.
"""

from __future__ import annotations

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)
from serving_fakes import DIGITS, EN_DE, EN_FR, LANGID, OWN, FakeAnswerer, FakeFleet, service

from eagleray_serving.edge import Edge

CARDS = (EN_FR, EN_DE, LANGID, DIGITS, OWN)
COLUMNS = {OWN.name: ["a"], DIGITS.name: ["image"]}
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def classified(value: object) -> dict[str, object]:
    return {"label": "fr", "score": 1.0, "scores": {"fr": 1.0}}


def document() -> schemathesis.schemas.BaseSchema:
    services = {}
    for card in CARDS:
        answerer = FakeAnswerer(classified if card.verb == "classify" else None, version=card.version)
        services[card.name] = service(card, answerer, COLUMNS.get(card.name, ["text"]))
    fleet = FakeFleet(services)
    app = Edge(CARDS, fleet, max_body_bytes=100_000, body_timeout_s=2).application()
    return schemathesis.openapi.from_asgi("/openapi.json", app)


OPERATIONS = {each.ok().label: each.ok() for each in document().get_all_operations()}


def explore(label: str, mode: GenerationMode, num_examples: int, *, is_new: bool) -> int:
    """Ask what an operation says it takes, or what it says it does not; return how many requests that were."""
    operation = OPERATIONS[label]
    checks = CHECKS if mode is GenerationMode.POSITIVE else [*CHECKS, negative_data_rejection]
    num_asked = 0

    @settings(
        max_examples=num_examples,
        derandomize=not is_new,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def ask(case: Case) -> None:
        nonlocal num_asked
        num_asked += 1
        case.call_and_validate(checks=checks)

    ask()
    return num_asked


def test_the_document_has_every_route() -> None:
    assert len(OPERATIONS) >= 14
    assert {f"POST {card.path}" for card in CARDS} <= set(OPERATIONS)


@pytest.mark.parametrize("label", OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(label: str) -> None:
    assert explore(label, GenerationMode.POSITIVE, 6, is_new=False) >= 1


@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST")])
def test_what_the_document_does_not_allow_is_refused(label: str) -> None:
    assert explore(label, GenerationMode.NEGATIVE, 12, is_new=False) >= 6


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
@pytest.mark.parametrize("label", [label for label in OPERATIONS if label.startswith("POST")])
def test_many_requests_find_no_fault(label: str, mode: GenerationMode) -> None:
    assert explore(label, mode, 250, is_new=True) >= 20
