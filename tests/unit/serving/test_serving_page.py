"""The page for people: what of it is sent to whom, and how. What it does in a browser is tested beside this."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib.resources import files
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI
from serving_fakes import EN_FR, LANGID, FakeFleet, call, service

from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate
from eagleray_serving.keys import KeyFile, new_key
from eagleray_serving.metrics import Metrics, Reports
from eagleray_serving.page import ASSET_PATHS, ASSETS, DOCUMENT, FOLDER
from eagleray_serving.plan import ModelPlan
from eagleray_serving.protection import Protection

ROOT = Path(__file__).parents[3]
BROWSER = {"accept": "text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8"}
PATHS = ("/", *ASSET_PATHS)


def application(gate: Gate | None = None) -> FastAPI:
    fleet = FakeFleet({EN_FR.name: service(EN_FR)})
    return Edge([EN_FR], fleet, max_body_bytes=1000, body_timeout_s=1, gate=gate).application()


def get(path: str, **headers: str) -> httpx.Response:
    return call(application(), "GET", path, headers={**BROWSER, **headers})


def test_a_browser_gets_the_page_and_everybody_else_the_json_that_was_always_there() -> None:
    page = get("/")
    assert (page.status_code, page.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert page.text.startswith("<!doctype html>")
    for accept in ("*/*", "application/json", "application/json, text/html", ""):
        answer = call(application(), "GET", "/", headers={"accept": accept})
        assert (answer.json()["name"], answer.headers["vary"]) == ("eagleray", "accept")
    assert page.headers["vary"] == "accept"


def test_the_page_and_its_parts_are_sent_under_a_policy_that_lets_nothing_else_run() -> None:
    for path in PATHS:
        headers = get(path).headers
        policy = dict(each.split(" ", 1) for each in headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        assert (policy["frame-ancestors"], policy["form-action"], policy["base-uri"]) == ("'none'",) * 3
        assert (headers["x-content-type-options"], headers["referrer-policy"]) == ("nosniff", "no-referrer")


def test_a_browser_asks_again_and_is_sent_only_what_has_changed() -> None:
    for path in PATHS:
        first = get(path)
        assert first.headers["cache-control"] == "no-cache"
        again = get(path, **{"if-none-match": f'"other", W/{first.headers["etag"]}'})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
        assert get(path, **{"if-none-match": '"other"'}).status_code == 200
    assert len({get(path).headers["etag"] for path in PATHS}) == len(PATHS)


def test_parts_have_the_types_that_browsers_insist_on() -> None:
    types = {path.rpartition(".")[2]: get(path).headers["content-type"] for path in ASSET_PATHS}
    assert types == {
        "css": "text/css; charset=utf-8",
        "js": "text/javascript; charset=utf-8",
        "svg": "image/svg+xml",
    }


def test_only_the_files_that_are_named_are_sent_and_no_path_is_redirected() -> None:
    folder = files("eagleray_serving") / FOLDER
    assert {each.name for each in folder.iterdir()} == {DOCUMENT, *ASSETS}
    for path in (f"/{FOLDER}", f"/{FOLDER}/{DOCUMENT}", f"/{FOLDER}/nothing.js", f"/{FOLDER}/..%2fpage.py"):
        assert get(path).status_code == 404
    assert get(f"{ASSET_PATHS[0]}/").status_code == 200
    assert call(application(), "POST", "/", b"{}", BROWSER).status_code == 405
    assert call(application(), "HEAD", "/", headers=BROWSER).content == b""


def test_the_page_names_nothing_from_elsewhere_and_holds_no_script_or_style_of_its_own() -> None:
    page = get("/").text
    loaded = re.findall(r'(?:src|href)="([^"#]+)"', page)
    assert {f"/{each}" for each in loaded if each.startswith(FOLDER)} <= set(ASSET_PATHS)
    assert not [each for each in loaded if ":" in each or each.startswith("/")]
    assert not re.search(r"<style|style=|<script(?![^>]* src=)| on[a-z]+=", page)
    for name in ASSETS:
        text = (files("eagleray_serving") / FOLDER / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|@import|\burl\(|\beval\(|innerHTML", text), name


def test_with_keys_the_page_can_be_read_and_its_calls_cannot_be_made(tmp_path: Path) -> None:
    file = KeyFile(tmp_path / "keys.json")
    file.add(new_key("one", ["translate"])[1])
    app = application(Gate(Protection(keys=str(file.path))))
    assert {path: call(app, "GET", path, headers=BROWSER).status_code for path in PATHS} == dict.fromkeys(
        PATHS, 200
    )
    assert call(app, "GET", "/v1/models", headers=BROWSER).status_code == 401
    # A challenge of this scheme opens no window of the browser's own over the page.
    assert call(app, "GET", "/v1/models").headers["www-authenticate"].startswith("Bearer")


def test_the_list_of_models_tells_how_much_waits_where_replicas_told_it() -> None:
    reports = Reports()
    for replica, tokens in (("a", 30), ("b", 12)):
        metrics = Metrics()
        metrics.watch_queue(lambda tokens=tokens: tokens)  # type: ignore[misc]
        reports.take("en-fr", replica, metrics.families())
    assert reports.queued_tokens() == {"en-fr": 42}

    edge = Edge([EN_FR], FakeFleet({EN_FR.name: service(EN_FR)}), max_body_bytes=1000, body_timeout_s=1)
    app = edge.application()
    assert call(app, "GET", "/v1/models").json()["models"][0]["replicas"] == {"running": 1, "starting": 0}
    edge.reports = reports
    shown = call(app, "GET", "/v1/models").json()["models"][0]["replicas"]
    assert shown == {"running": 1, "starting": 0, "queued_tokens": 42}


def _contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(scheme: str) -> None:
    """WCAG 2.1, 1.4.3 and 1.4.11: 4.5 for words, 3 for the edges of fields."""
    css = (files("eagleray_serving") / FOLDER / "page.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", css, re.DOTALL)
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", blocks[scheme == "dark"]))
    assert len(colours) == 14
    words = [(word, ground) for word in ("text", "muted", "accent") for ground in ("ground", "surface", "tint")]
    words += [("accent-text", "accent"), ("bad", "bad-ground"), ("text", "bad-ground"), ("bad", "surface")]
    for word, ground in words:
        assert _contrast(colours[word], colours[ground]) >= 4.5, (word, ground)
    for ground in ("ground", "surface"):
        assert _contrast(colours["field"], colours[ground]) >= 3


def test_a_plan_keeps_labels_and_columns_on_its_way_through_json(tmp_path: Path) -> None:
    import json
    from dataclasses import replace

    from eagleray.config.schema import ServeConfig

    card = replace(EN_FR, labels=("a", "b"), columns=("x",))
    plan = ModelPlan(str(tmp_path), card, ("text",), ServeConfig())
    assert ModelPlan.from_args(json.loads(json.dumps(plan.as_args()))) == plan
    assert card.as_json()["labels"] == ("a", "b") and "labels" not in EN_FR.as_json()


@pytest.mark.slow
def test_a_classifier_tells_the_labels_that_its_checkpoint_holds() -> None:
    from eagleray.labels import labels_file
    from eagleray_serving.plan import _labels

    class Files:
        def __init__(self, files: dict[str, bytes]) -> None:
            self.files = lambda: files

    held = Files(labels_file(["non", "oui"]))
    assert _labels(LANGID, held) == ("non", "oui")  # type: ignore[arg-type]
    assert _labels(LANGID, Files({})) == (), "a task of one's own may keep them elsewhere"  # type: ignore[arg-type]
    assert _labels(EN_FR, held) == ()  # type: ignore[arg-type]


def test_the_wheel_holds_every_file_of_the_page(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="nothing builds a wheel here; pip install --editable '.[dev]'")
    words = ["-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run([sys.executable, *words], cwd=ROOT, check=True, timeout=120)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"eagleray_serving/{FOLDER}/{name}" for name in (DOCUMENT, *ASSETS)} <= names


def test_serve_prints_the_address_of_the_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from eagleray.config.schema import ServeConfig
    from eagleray.console import reporting
    from eagleray_serving.commands import _show
    from eagleray_serving.home import own_record
    from eagleray_serving.server import Served

    plan = ModelPlan(str(tmp_path), EN_FR, ("text",), ServeConfig())
    record = own_record("s1", None, "http://127.0.0.1:8000", ["model-en-fr"], [EN_FR.ref], None)
    with reporting() as out:
        _show(out, Served(record, "haproxy", (plan,)), False)
    assert "page: http://127.0.0.1:8000/" in capsys.readouterr().out.splitlines()
