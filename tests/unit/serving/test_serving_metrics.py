"""What is counted, and what the edge shows of it, read by Prometheus's own parser."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from serving_fakes import EN_FR, LANGID, FakeFleet, call, service

from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.keys import KeyFile, new_key
from eagleray_serving.metrics import REPORT_LIFE_S, Metrics, Reports
from eagleray_serving.protection import Protection
from eagleray_serving.visits import Usage


def read(text: str) -> dict[str, Any]:
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Any], sample: str, **labels: str) -> float:
    found = [
        each.value
        for family in families.values()
        for each in family.samples
        if each.name == sample and labels.items() <= each.labels.items()
    ]
    return sum(found)


def counted(num_items: int) -> Metrics:
    metrics = Metrics()
    metrics.count_request("/v1/translate", "POST", 200, 0.02)
    metrics.count_answer(Usage("en-fr", "v1", num_items, 7, "bulk"), 0.02)
    metrics.count_batch(3, 100)
    metrics.watch_queue(lambda: 12.0)
    return metrics


def test_the_edge_shows_what_every_replica_told_last() -> None:
    reports = Reports()
    for name, num_items in (("a", 1), ("b", 5)):
        told = pickle.loads(pickle.dumps(counted(num_items).families()))
        assert reports.take("en-fr", name, told) == (1 if name == "a" else 2)
    families = read(reports.render(Metrics()).decode())
    assert value(families, "eagleray_items_total", model="en-fr", version="v1", lane="bulk") == 6
    assert value(families, "eagleray_items_total", replica="b") == 5
    assert value(families, "eagleray_tokens_total") == 14
    assert value(families, "eagleray_requests_total", status="200", route="/v1/translate", method="POST") == 2
    assert value(families, "eagleray_queued_tokens", replica="a") == 12
    assert value(families, "eagleray_batch_items_bucket", le="4.0") == 2
    assert value(families, "eagleray_batch_items_bucket", le="2.0") == 0
    assert value(families, "eagleray_answer_seconds_count", lane="bulk") == 2
    assert {family.type for family in families.values()} == {"counter", "gauge", "histogram"}


def test_whose_queue_and_batches_they_are_is_told_of_every_replica() -> None:
    reports = Reports()
    reports.take("en-fr", "a", counted(1).families())
    other = Metrics()
    other.watch_queue(lambda: 30.0)
    reports.take("langid", "b", other.families())
    families = read(reports.render(Metrics()).decode())
    assert value(families, "eagleray_queued_tokens", model="en-fr") == 12
    assert value(families, "eagleray_queued_tokens", model="langid", replica="b") == 30
    assert value(families, "eagleray_batch_items_count", model="en-fr") == 1
    assert value(families, "eagleray_batch_items_count", model="langid") == 0
    assert value(families, "eagleray_requests_total", model="en-fr", route="/v1/translate") == 1


def test_a_replica_that_is_gone_takes_its_series_with_it() -> None:
    now = [0.0]
    reports = Reports(lambda: now[0])
    reports.take("en-fr", "a", counted(1).families())
    now[0] = REPORT_LIFE_S - 1
    assert reports.take("en-fr", "b", counted(1).families()) == 2
    assert reports.take("other", "c", counted(1).families()) == 1
    now[0] = REPORT_LIFE_S + 1
    assert reports.take("en-fr", "b", counted(1).families()) == 1
    families = read(reports.render(Metrics()).decode())
    assert value(families, "eagleray_items_total", replica="a") == 0
    assert value(families, "eagleray_items_total") == 2


def test_a_client_cannot_make_series() -> None:
    gate = Gate()
    app = Edge([EN_FR], FakeFleet({}), max_body_bytes=10, body_timeout_s=1, gate=gate).application()
    for number in range(50):
        call(app, f"M{number}", f"/nothing/{number}")
    (family,) = [each for each in gate.metrics.families() if each.name == "eagleray_requests"]
    assert {(labels["route"], labels["method"]) for _, labels, _ in family.samples} == {("unmatched", "other")}


def test_metrics_are_at_the_edge_for_whoever_may_see_them(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    secrets = {}
    for name, scopes in (("watcher", ["metrics"]), ("user", ["translate"]), ("operator", ["admin"])):
        secrets[name], kept = new_key(name, scopes)
        file.add(kept)
    for protection, statuses in (
        (Protection(), {None: 200}),
        (Protection(keys=str(file.path)), {None: 401, "watcher": 200, "user": 403, "operator": 200}),
    ):
        gate = Gate(protection)
        fleet = FakeFleet({card.name: service(card) for card in (EN_FR, LANGID)})
        app = Edge([EN_FR, LANGID], fleet, max_body_bytes=10, body_timeout_s=1, gate=gate).application()
        for who, status in statuses.items():
            headers = {} if who is None else {"authorization": f"Bearer {secrets[who]}"}
            response = call(app, "GET", "/metrics", headers=headers)
            assert response.status_code == status, who
            if status == 200:
                assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
                read(response.text)


def test_what_a_model_did_is_counted_where_it_did_it() -> None:
    model = service(EN_FR)
    call(model.application(), "POST", "/v1/translate", b'{"text": ["a", "b", "c"]}')
    families = {each.name: each for each in model.gate.metrics.families()}
    items = families["eagleray_items"].samples
    assert items == (
        ("eagleray_items_total", {"model": "en-fr", "version": EN_FR.version, "lane": "interactive"}, 3),
    )
