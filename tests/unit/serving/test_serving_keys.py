"""API keys: their file, who gets in with what, and what each may do; on the edge as on a replica's own port."""

from __future__ import annotations

import base64
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from serving_fakes import EN_DE, EN_FR, LANGID, FakeFleet, call, is_error, service
from starlette.types import ASGIApp

from eagleray.errors import ServingError, UsageError
from eagleray_serving.answering import Asking
from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.keys import ApiKey, KeyFile, KeyRing, keys_of, new_key
from eagleray_serving.protection import Protection
from eagleray_serving.schema import WireError
from eagleray_serving.visits import Usage, Visit, enter

BODY = b'{"text": "a"}'
MakeKey = Callable[..., str]


@pytest.fixture
def file(tmp_path: Path) -> KeyFile:
    return KeyFile(tmp_path / "keys.json")


@pytest.fixture
def make(file: KeyFile) -> MakeKey:
    """Makes a key in the file and returns it."""

    def make(name: str, *scopes: str, rate: float | None = None) -> str:
        key, kept = new_key(name, scopes or ("translate", "classify"), rate)
        file.add(kept)
        return key

    return make


def gate(file: KeyFile) -> Gate:
    return Gate(Protection(keys=str(file.path)))


def replica(file: KeyFile) -> ASGIApp:
    made = service(EN_FR)
    made.gate = gate(file)
    return made.application()


def edge(file: KeyFile) -> ASGIApp:
    cards = (EN_FR, EN_DE, LANGID)
    fleet = FakeFleet({card.name: service(card) for card in cards})
    return Edge(cards, fleet, max_body_bytes=1000, body_timeout_s=1, gate=gate(file)).application()


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_is_kept_as_its_hash_in_a_file_of_its_owner(file: KeyFile, make: MakeKey) -> None:
    key = make("one")
    assert len(key) >= 46 and key not in file.path.read_text()
    assert stat.S_IMODE(file.path.stat().st_mode) == 0o600
    (kept,) = file.read()
    assert (kept.name, kept.scopes) == ("one", ("translate", "classify"))
    assert KeyRing(file).find(key) == kept and KeyRing(file).find(key + "x") is None


def test_a_second_key_of_a_name_and_the_removal_of_none_are_refused(file: KeyFile, make: MakeKey) -> None:
    make("one")
    with pytest.raises(UsageError, match="a key named 'one' already"):
        make("one")
    with pytest.raises(UsageError, match="no key named 'two'"):
        file.remove("two")
    file.remove("one")
    assert file.read() == ()


@pytest.mark.parametrize(
    "name, scopes, rate",
    [
        ("", ["translate"], None),
        ("a b", ["translate"], None),
        ("a" * 65, ["translate"], None),
        ("a", [], None),
        ("a", ["everything"], None),
        ("a", ["translate/../x"], None),
        ("a", ["admin/x"], None),
        ("a", ["translate"], 0.0),
        ("a", ["translate"], float("inf")),
    ],
)
def test_what_cannot_be_a_key_is_a_wrong_call(name: str, scopes: list[str], rate: float | None) -> None:
    with pytest.raises(UsageError, match="this cannot be a key") as caught:
        new_key(name, scopes, rate)
    assert " er_" not in caught.value.message


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 2, "keys": []}', '{"keys": [{"name": "a"}]}', "\x00"])
def test_a_file_that_holds_something_else_is_refused(file: KeyFile, text: str) -> None:
    file.path.write_text(text)
    file.path.chmod(0o600)
    with pytest.raises(ServingError, match=r"keys\.json is not a file of keys"):
        KeyRing(file)


def test_a_file_that_others_may_write_is_refused(file: KeyFile, make: MakeKey) -> None:
    make("one")
    file.path.chmod(0o622)
    with pytest.raises(ServingError, match="written by others"):
        KeyRing(file)


def test_a_file_that_is_not_there_is_refused(file: KeyFile) -> None:
    with pytest.raises(ServingError, match="cannot be read"):
        KeyRing(file)


def test_keys_of_the_environment_are_names_keys_and_scopes() -> None:
    one, two = keys_of(f"ci={'a' * 40}  ops={'b' * 32}:admin,metrics\n")
    assert (one.name, one.scopes) == ("ci", ("translate", "classify", "predict"))
    assert (two.name, two.scopes) == ("ops", ("admin", "metrics"))
    secret = "s3cret"
    for text in (f"ci={secret}", secret, f"={'a' * 40}", f"a={'a' * 40}:all", f"a={'a' * 40} a={'b' * 40}"):
        with pytest.raises(UsageError) as caught:
            keys_of(text)
        assert secret not in caught.value.message and "aaaa" not in caught.value.message


def test_a_running_server_follows_its_file(file: KeyFile, make: MakeKey) -> None:
    one = make("one")
    ring = KeyRing(file)
    two = make("two")
    assert ring.find(two) is None
    ring.follow()
    assert ring.find(two) is not None
    file.remove("one")
    ring.follow()
    assert (ring.find(one), ring.named("one")) == (None, None)


def test_a_file_that_is_gone_holds_no_key_and_a_broken_one_changes_nothing(file: KeyFile, make: MakeKey) -> None:
    key = make("one")
    ring = KeyRing(file)
    good = file.path.read_bytes()
    file.path.write_text("{")
    ring.follow()
    assert ring.find(key) is not None
    file.path.write_bytes(good)
    ring.follow()
    assert ring.find(key) is not None
    file.path.unlink()
    ring.follow()
    assert ring.find(key) is None and ring.is_asked


@pytest.mark.parametrize("place", [replica, edge])
def test_without_a_key_or_with_another_the_answer_is_401(
    place: Callable[[KeyFile], ASGIApp], file: KeyFile, make: MakeKey
) -> None:
    make("one")
    app = place(file)
    for headers in (
        {},
        bearer(""),
        bearer("er_wrong"),
        {"authorization": "Bearer"},
        {"authorization": "Basic !!"},
        {"x-api-key": "nothing"},
    ):
        response = call(app, "POST", "/v1/translate/en-fr", BODY, headers)
        assert (response.status_code, is_error(response)) == (401, True), headers
        assert response.headers["www-authenticate"] == 'Bearer realm="eagleray"'


@pytest.mark.parametrize("place", [replica, edge])
def test_each_way_of_sending_a_key_is_taken(
    place: Callable[[KeyFile], ASGIApp], file: KeyFile, make: MakeKey
) -> None:
    key = make("one")
    app = place(file)
    basic = base64.b64encode(f"anybody:{key}".encode()).decode()
    for headers in (
        bearer(key),
        {"authorization": f"bearer  {key}"},
        {"authorization": f"Basic {basic}"},
        {"authorization": f"DeepL-Auth-Key {key}"},
        {"x-api-key": key},
    ):
        assert call(app, "POST", "/v1/translate/en-fr", BODY, headers).status_code == 200, headers


@pytest.mark.parametrize(
    "scopes, path, status",
    [
        (["translate"], "/v1/translate/en-fr", 200),
        (["translate"], "/v1/translate/en-de", 200),
        (["translate"], "/v1/classify", 403),
        (["translate/en-fr"], "/v1/translate/en-fr", 200),
        (["translate/en-fr"], "/v1/translate/en-de", 403),
        (["classify/en-fr"], "/v1/translate/en-fr", 403),
        (["classify", "translate/en-de"], "/v1/translate/en-de", 200),
        (["metrics"], "/v1/translate/en-fr", 403),
        (["admin"], "/v1/translate/en-fr", 200),
    ],
)
def test_a_key_may_what_its_scopes_say(
    file: KeyFile, make: MakeKey, scopes: list[str], path: str, status: int
) -> None:
    key = make("one", *scopes)
    response = call(edge(file), "POST", path, BODY, bearer(key))
    assert response.status_code == status
    if status == 403:
        assert "the key one may not" in response.json()["error"]["message"]
    if path == "/v1/translate/en-fr":
        assert call(replica(file), "POST", path, BODY, bearer(key)).status_code == status


def test_what_says_only_that_the_server_lives_needs_no_key(file: KeyFile, make: MakeKey) -> None:
    key = make("one")
    app = edge(file)
    statuses = {
        path: call(app, "GET", path).status_code
        for path in ("/", "/healthz", "/readyz", "/v1/models", "/docs", "/openapi.json", "/nothing")
    }
    assert statuses == {
        "/": 200,
        "/healthz": 200,
        "/readyz": 200,
        "/v1/models": 401,
        "/docs": 401,
        "/openapi.json": 401,
        "/nothing": 401,
    }
    assert call(app, "GET", "/readyz").json() == {"status": "ready"}
    told = call(app, "GET", "/readyz", headers=bearer(key)).json()["models"]
    assert set(told) == {"en-fr", "en-de", "langid"}
    assert call(app, "GET", "/docs").headers["www-authenticate"].startswith("Basic")
    assert call(app, "GET", "/docs", headers=bearer(key)).status_code == 200
    assert call(app, "GET", "/v1/models", headers=bearer(key)).status_code == 200


def test_a_removed_key_is_refused_once_the_file_was_looked_at(file: KeyFile, make: MakeKey) -> None:
    key = make("one")
    guard = gate(file)
    made = service(EN_FR)
    made.gate = guard
    app = made.application()
    assert call(app, "POST", "/v1/translate", BODY, bearer(key)).status_code == 200
    file.remove("one")
    guard.ring.follow()
    assert call(app, "POST", "/v1/translate", BODY, bearer(key)).status_code == 401


def test_a_key_in_a_body_is_taken_and_no_model_is_used_without_one(file: KeyFile, make: MakeKey) -> None:
    key = make("one", "translate")
    guard = gate(file)
    for given, status in ((None, 401), ("er_wrong", 401), (key, 403)):
        visit = Visit("id")
        enter(visit)
        with pytest.raises(WireError) as caught:
            guard.identify(given)
            guard.admit("classify/langid")
        assert caught.value.status == status
    enter(Visit("id"))
    with pytest.raises(WireError, match="a key is needed"):
        guard.admit("translate/en-fr")
    guard.identify(key)
    guard.admit("translate/en-fr")


def test_what_was_handed_over_is_of_the_key_that_was_let_in_elsewhere(file: KeyFile, make: MakeKey) -> None:
    make("one", "translate", rate=1.0)
    guard = gate(file)
    asking = Asking("id", key="one")
    visit = guard.readmit(asking)
    guard.rates.charge(visit.key, 1000)
    guard.admit("translate/en-fr")  # also in debt: it was asked where it entered
    guard.charge(Usage("en-fr", "v1", 2, 30, "bulk"), asking)
    assert [usage.num_tokens for usage in visit.used] == [30]


def test_no_answer_and_no_error_shows_a_key(file: KeyFile, make: MakeKey) -> None:
    key = make("one")
    app = edge(file)
    for path in ("/v1/models", "/docs", "/openapi.json", "/nothing", f"/{key}"):
        response = call(app, "GET", path, headers={**bearer(key), "x-api-key": key})
        assert key not in json.dumps(dict(response.headers))
        assert key not in response.text or path == f"/{key}"


def test_a_key_that_is_refused_before_it_is_hashed_costs_nothing() -> None:
    assert KeyRing().is_asked is False and KeyRing().find("anything") is None


def test_keys_added_at_once_are_all_kept(file: KeyFile) -> None:
    import concurrent.futures

    def add(number: int) -> None:
        file.add(new_key(f"k{number}", ["translate"])[1])

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(add, range(24)))
    assert sorted(key.name for key in file.read()) == sorted(f"k{number}" for number in range(24))
    assert os.listdir(file.path.parent).count("keys.json") == 1


def test_a_key_is_frozen() -> None:
    key: Any = new_key("a", ["translate"])[1]
    with pytest.raises(ValueError):
        key.scopes = ("admin",)
    assert isinstance(key, ApiKey)
