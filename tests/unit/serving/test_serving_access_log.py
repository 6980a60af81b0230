"""The access log: a line per request that says what it took, and neither what it said nor where it came from."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import EN_DE, EN_FR, FakeFleet, call, service
from starlette.types import ASGIApp

from eagleray_serving.access_log import AccessLog
from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.keys import KeyFile, new_key
from eagleray_serving.protection import Protection
from eagleray_serving.visits import Usage, Visit

TEXT = "a text that nobody else may read"
BODY = json.dumps({"text": [TEXT, "b"]}).encode()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def model_app(gate: Gate) -> ASGIApp:
    model = service(EN_FR)
    model.gate = gate
    return model.application()


def test_a_request_is_a_line_that_says_what_it_took(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    secret, kept = new_key("ci", ["translate"])
    file.add(kept)
    path = tmp_path / "access.log"
    gate = Gate(Protection(str(file.path), str(path)))
    app = model_app(gate)
    headers = {"authorization": f"Bearer {secret}", "x-request-id": "abc"}
    call(app, "POST", "/v1/translate/en-fr", BODY, headers)
    call(app, "POST", "/v1/translate/en-fr", b"{", headers)
    call(app, "POST", "/v1/translate/en-fr", BODY)
    gate.log.flush()
    good, malformed, anonymous = lines(path)
    assert good.pop("ms") >= 0 and good.pop("time").endswith("Z")
    assert good == {
        "id": "abc",
        "method": "POST",
        "route": "/v1/translate/{model}",
        "model": "en-fr",
        "version": EN_FR.version,
        "status": 200,
        "items": 2,
        "tokens": 0,
        "key": "ci",
    }
    assert (malformed["status"], malformed["model"], malformed["key"]) == (400, None, "ci")
    assert (anonymous["status"], anonymous["route"], anonymous["key"]) == (401, "unmatched", None)
    written = path.read_text()
    assert TEXT not in written and secret not in written and "127.0.0.1" not in written
    assert path.stat().st_mode & 0o077 == 0


def test_what_is_handed_on_is_told_by_the_edge(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    gate = Gate(Protection(access_log=str(path)))
    fleet = FakeFleet({card.name: service(card) for card in (EN_FR, EN_DE)})
    app = Edge([EN_FR, EN_DE], fleet, max_body_bytes=1000, body_timeout_s=1, gate=gate).application()
    call(app, "POST", "/v1/translate", b'{"text": "a", "target": "de"}')
    call(app, "GET", "/nothing/of/the/kind")
    call(app, "HEAD", "/healthz")
    gate.log.flush()
    handed_on, unknown, head = lines(path)
    assert (handed_on["model"], handed_on["version"], handed_on["items"]) == ("en-de", EN_DE.version, 1)
    assert (unknown["route"], unknown["status"]) == ("unmatched", 404)
    assert (head["route"], head["status"]) == ("/healthz", 200)


def test_addresses_are_told_only_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    gate = Gate(Protection(access_log=str(path), has_addresses=True))
    call(model_app(gate), "POST", "/v1/translate", BODY, {"x-forwarded-for": "10.1.2.3"})
    gate.log.flush()
    assert lines(path)[0]["address"] == "10.1.2.3"


def test_a_file_that_is_full_becomes_the_one_of_before_and_several_processes_share_it(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    logs = [AccessLog(path, max_file_bytes=20_000) for _ in range(4)]

    def write(log: AccessLog) -> None:
        for number in range(200):
            log.add(Visit(f"{id(log)}-{number}"), "GET", "/", 200, None)
            log.flush()

    threads = [threading.Thread(target=write, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    before = tmp_path / "access.log.1"
    assert before.stat().st_size < 25_000
    for each in (path, before):
        assert all(line["status"] == 200 for line in lines(each))


def test_a_file_that_was_moved_away_is_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    log = AccessLog(path)
    for name in ("first", "second"):
        log.add(Visit(name), "GET", "/", 200, None)
        log.flush()
        path.rename(tmp_path / name)
    assert [lines(tmp_path / name)[0]["id"] for name in ("first", "second")] == ["first", "second"]


def test_a_disk_that_takes_nothing_costs_lines_and_no_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    log = AccessLog(tmp_path / "no such folder" / "access.log")
    visit = Visit("a")
    visit.used.append(Usage("m", "v", 1, 2))
    log.add(visit, "GET", "/", 200, None)
    log.flush()
    assert "1 lines of the access log were lost" in caplog.text
    log.flush()


def test_parts_of_a_request_are_added_up(tmp_path: Path) -> None:
    log = AccessLog(tmp_path / "access.log")
    visit = Visit("a")
    visit.used += [Usage("m", "v1", 10, 20, "bulk"), Usage("m", "v1", 5, 9, "bulk")]
    log.add(visit, "POST", "/v1/translate", 200, None)
    log.flush()
    (line,) = lines(tmp_path / "access.log")
    assert (line["model"], line["version"], line["items"], line["tokens"]) == ("m", "v1", 15, 29)
