"""Commands to a running server: who may give them, and what they answer; what a new version is tried on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import EN_FR, FakeFleet, call, is_error, service
from version_fakes import NAME, V1, V2, DictNotes, Site, commit

from eagleray.engine import ItemError, ModelSummary
from eagleray.errors import ServingError, UsageError
from eagleray_serving.answering import Answers, ItemFailure
from eagleray_serving.board import Board
from eagleray_serving.commanding import choose_server
from eagleray_serving.control import Control
from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.home import Home, ServerRecord
from eagleray_serving.keys import KeyFile, new_key
from eagleray_serving.protection import Protection
from eagleray_serving.rollout import Rollout
from eagleray_serving.room import no_room
from eagleray_serving.trial import NUM_EXAMPLES, Recorded, Recorder, check_same_kind, try_on

TOKEN = "secret"
BEARER = {"authorization": f"Bearer {TOKEN}"}


def application(site: Site, token: str | None = TOKEN, protection: Protection | None = None) -> Any:
    sha256 = None if token is None else hashlib.sha256(token.encode()).hexdigest()
    control = Control([site.plan], DictNotes(), sha256)
    fleet = FakeFleet({NAME: service(EN_FR)})
    gate = Gate(protection, owner_sha256=sha256)
    edge = Edge([site.plan.card], fleet, max_body_bytes=1000, body_timeout_s=1, versions=control.views, gate=gate)
    app = edge.application()
    app.router.routes.extend(control.routes())
    return app


def test_a_command_without_the_servers_token_is_refused(tmp_path: Path) -> None:
    app = application(Site(tmp_path, num_replicas=0))
    for path in ("canary", "promote", "rollback"):
        for headers in ({}, {"authorization": "Bearer other"}, {"authorization": f"Basic {TOKEN}"}):
            refused = call(app, "POST", f"/v1/models/{NAME}/{path}", b"{}", headers)
            assert (refused.status_code, is_error(refused)) == (401, True)
    closed = application(Site(tmp_path / "other", num_replicas=0), token=None)
    assert call(closed, "POST", f"/v1/models/{NAME}/promote", b"{}", BEARER).status_code == 403


def test_where_there_are_keys_one_for_admin_commands_as_well_as_the_servers_token(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    keys = {}
    for scope in ("admin", "translate"):
        keys[scope], kept = new_key(scope, [scope])
        file.add(kept)
    app = application(Site(tmp_path, num_replicas=0), protection=Protection(keys=str(file.path)))
    asked = {None: 401, "other": 401, keys["translate"]: 403, keys["admin"]: 409, TOKEN: 409}
    for key, status in asked.items():
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        response = call(app, "POST", f"/v1/models/{NAME}/promote", b"{}", headers)
        assert (response.status_code, is_error(response)) == (status, True), response.text


def test_commands_answer_what_they_did_and_v1_models_shows_it(tmp_path: Path) -> None:
    site = Site(tmp_path, num_replicas=0)
    commit(site.store, 2)
    app = application(site)
    begun = call(
        app, "POST", f"/v1/models/{NAME}/canary", json.dumps({"ref": "@latest", "percent": 5}).encode(), BEARER
    )
    assert (begun.status_code, begun.json()["version"]) == (200, V2)
    (shown,) = call(app, "GET", "/v1/models").json()["models"]
    assert (shown["version"], shown["rollout"]["current"]) == (V1, V1)
    assert shown["rollout"]["loading"]["version"] == V2
    ended = call(app, "POST", f"/v1/models/{NAME}/rollback", b"{}", BEARER)
    assert (ended.status_code, ended.json()["version"]) == (200, V1)


def test_the_scores_that_are_shown_are_those_of_the_version_that_answers(tmp_path: Path) -> None:
    site, notes = Site(tmp_path, num_replicas=0), DictNotes()
    commit(site.store, 2, loss=0.5)
    control = Control([site.plan], notes)
    edge = Edge(
        [site.plan.card], FakeFleet({}), max_body_bytes=1000, body_timeout_s=1, versions=control.views
    ).application()
    (before,) = call(edge, "GET", "/v1/models").json()["models"]
    assert (before["version"], before["scores"]) == (V1, {})
    Board(notes, site.plan.server, NAME).tell(Rollout(V2, since=0.0))
    later = Control([site.plan], notes)
    assert later.views()[NAME]["current"] == V2
    assert later.views()[NAME]["scores"] == {"loss": 0.5}


@pytest.mark.parametrize(
    "path, body, status",
    [
        ("en-fr/canary", {"ref": "@latest", "percent": 0}, 422),
        ("en-fr/canary", {"ref": "@latest", "percent": 101}, 422),
        ("en-fr/canary", {"ref": "@latest", "percent": "10"}, 422),
        ("en-fr/canary", {"ref": "@latest", "more": 1}, 422),
        ("en-fr/canary", {}, 422),
        ("en-fr/canary", {"ref": "@nobody"}, 404),
        ("en-fr/canary", {"ref": "../../etc"}, 409),
        ("en-fr/canary", {"ref": "@latest"}, 409),
        ("en-fr/promote", {}, 409),
        ("en-fr/rollback", {}, 409),
        ("other/promote", {}, 404),
    ],
)
def test_commands_that_make_no_sense_are_refused(
    tmp_path: Path, path: str, body: dict[str, Any], status: int
) -> None:
    app = application(Site(tmp_path, num_replicas=0))
    refused = call(app, "POST", f"/v1/models/{path}", json.dumps(body).encode(), BEARER)
    assert (refused.status_code, is_error(refused)) == (status, True), refused.text


def record(id: str, *models: str) -> ServerRecord:
    return ServerRecord(id, 1, 1.0, None, None, f"http://127.0.0.1/{id}", (), models, None, "ready")


def test_the_server_of_a_command_is_the_one_that_serves_the_model() -> None:
    servers = [record("a", "en-fr@v1"), record("b", "langid@v1", "en-de@v1"), record("c", "en-de@v1")]
    assert choose_server(servers, "en-fr", None).id == "a"
    assert choose_server(servers, "en-de", "c").id == "c"
    for name, server, message in (
        ("en-de", None, "2 servers serve en-de"),
        ("en-es", None, "no server here serves 'en-es'"),
        ("en-fr", "d", "there is no server 'd'"),
    ):
        with pytest.raises(UsageError, match=message):
            choose_server(servers, name, server)
    with pytest.raises(UsageError, match="no server runs"):
        choose_server([], "en-fr", None)


def test_a_servers_token_is_its_users_alone_and_goes_with_the_record(tmp_path: Path) -> None:
    home = Home(tmp_path)
    sha256 = home.new_token_sha256("a")
    token = home.token("a")
    assert token is not None and hashlib.sha256(token.encode()).hexdigest() == sha256
    (path,) = tmp_path.glob("serve/*.token")
    assert path.stat().st_mode & 0o077 == 0
    home.remove(record("a"))
    assert home.token("a") is None


class FakeEngine:
    def __init__(self, answer: Any) -> None:
        self.summary = ModelSummary("m@v2", "m", "v2", "t", "translate", ("source",), (), None, None, None)
        self._answer = answer

    def answer(self, items: Any, options: Any = None) -> Any:
        return [self._answer for _ in items]


def recorded(*answers: dict[str, Any]) -> list[Recorded]:
    return [Recorded({"source": "a"}, {}, answer) for answer in answers]


@pytest.mark.parametrize(
    "before, found, message",
    [
        (
            {"text": "une heure"},
            ItemError("model_failed", "it raised", detail="whose text"),
            r"m@v2 fails on a recorded example: model_failed\n  its server's log says more$",
        ),
        ({"text": "une heure"}, {"label": "fr"}, "with label, the current version with text"),
        ({"score": 0.5}, {"score": float("nan")}, "a number that is not finite"),
        ({"scores": {"fr": 0.5}}, {"scores": {"fr": float("inf")}}, "a number that is not finite"),
        ({"text": "une heure"}, {"text": "une " * 500}, "with 2000 characters, the current version with 9"),
        ({"text": "une heure " * 100}, {"text": ""}, "with 0 characters, the current version with 1000"),
    ],
)
def test_a_version_that_answers_recorded_examples_wrongly_is_refused(
    before: dict[str, Any], found: Any, message: str
) -> None:
    with pytest.raises(ServingError, match=message):
        try_on(FakeEngine(found), recorded(before))


def test_a_version_that_answers_them_otherwise_but_sanely_is_not() -> None:
    try_on(FakeEngine({"text": "deux heures"}), recorded({"text": "une heure"}, {"text": ""}))
    try_on(FakeEngine({"text": "anything"}), [])


def test_a_version_of_another_task_is_refused() -> None:
    check_same_kind(FakeEngine(None), "translate", ["source"])
    with pytest.raises(ServingError, match="m@v2 answers /v1/translate with source, and this model /v1/classify"):
        check_same_kind(FakeEngine(None), "classify", ["text"])


def test_a_handful_of_short_items_that_were_answered_is_recorded() -> None:
    recorder = Recorder()
    recorder.record([{"t": "x" * 5000}, {"t": "b"}], {}, Answers("v1", [{"text": "X"}, {"text": "B"}]))
    recorder.record([{"t": "c"}], {}, Answers("v1", [ItemFailure("model_failed", "no")]))
    assert [each.item for each in recorder.examples()] == [{"t": "b"}]
    for number in range(100):
        recorder.record([{"t": str(number)}], {}, Answers("v1", [{"text": "X"}]))
    assert [each.item["t"] for each in recorder.examples()] == [str(n) for n in range(100 - NUM_EXAMPLES, 100)]


def test_room_is_counted_from_the_weights_alone(tmp_path: Path) -> None:
    from eagleray.store.registry import Registry

    manifest = Registry(Site(tmp_path, num_replicas=0).store).open(f"{NAME}@{V1}").manifest
    assert no_room(manifest, gpu=False) is None
    huge = manifest.tensors[0].model_copy(update={"shape": (2**42,)})
    reason = no_room(manifest.model_copy(update={"tensors": (huge,)}), gpu=False)
    assert reason is not None and reason.startswith("loading r1-step-00000001 needs 50,331,904 MiB of memory, and")
    optimizer = huge.model_copy(update={"name": "optim.w.exp_avg"})
    assert no_room(manifest.model_copy(update={"tensors": (optimizer,)}), gpu=False) is None
