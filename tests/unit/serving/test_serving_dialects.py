"""Clients that people already have, each the real package, against a live server."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import Any

import deepl
import httpx
import numpy as np
import pytest
import tritonclient.http as triton
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from libretranslatepy import LibreTranslateAPI
from live import live
from PIL import Image
from serving_fakes import DIGITS, EN_DE, EN_FR, LANGID, OWN, FakeAnswerer, FakeFleet, service
from tritonclient.utils import InferenceServerException

from eagleray_serving.answering import Answered, ItemFailure
from eagleray_serving.catalog import ModelCard
from eagleray_serving.edge import Edge
from eagleray_serving.gate import Gate, Protection
from eagleray_serving.keys import KeyFile, new_key

FR_EN = ModelCard("fr-en", "r1-step-00000007", "translate", "text", "fr", "en")


def translate(value: Any) -> Answered:
    return ItemFailure("too_long", "it is too long") if value == "bad" else {"text": str(value).upper()}


def guess(value: Any) -> Answered:
    french = 0.9 if "é" in str(value) else 0.2
    scores = {"en": 1 - french, "fr": french}
    label = max(scores, key=scores.__getitem__)
    return {"label": label, "score": scores[label], "scores": scores}


def seven(value: Any) -> Answered:
    return {"label": "7", "score": 0.75, "scores": {"1": 0.25, "7": 0.75}}


COLUMNS = {"images": "image"}


def edge(cards: Sequence[tuple[ModelCard, Any]], gate: Gate | None = None) -> Edge:
    services = {
        card.name: service(card, FakeAnswerer(answer, version=card.version), [COLUMNS.get(card.inputs, "text")])
        for card, answer in cards
    }
    fleet = FakeFleet(services)
    return Edge([card for card, _ in cards], fleet, max_body_bytes=10**6, body_timeout_s=5, gate=gate)


TRANSLATORS = [(card, translate) for card in (EN_FR, EN_DE, FR_EN)]
ALL = [*TRANSLATORS, (LANGID, guess), (DIGITS, seven), (OWN, translate)]


@pytest.fixture(autouse=True)
def online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Hugging Face's client ask our own server; tests are offline otherwise."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with live(edge(ALL).application()) as url:
        yield url


def png() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()


def test_hugging_face_translates_and_classifies(url: str) -> None:
    client = InferenceClient()
    assert client.translation("hello", model=f"{url}/models/en-fr").translation_text == "HELLO"
    assert client.translation(
        "hello", model=f"{url}/models/en-fr", src_lang="en", tgt_lang="fr", generate_parameters={"num_beams": 2}
    ).translation_text == "HELLO"  # fmt: skip
    labels = client.text_classification("é", model=f"{url}/models/langid", top_k=1)
    assert [(each.label, each.score) for each in labels] == [("fr", 0.9)]
    images = client.image_classification(png(), model=f"{url}/models/digits")
    assert [each.label for each in images] == ["7", "1"]


def test_hugging_face_gets_its_errors(url: str) -> None:
    client = InferenceClient()
    with pytest.raises(HfHubHTTPError, match="it is too long"):
        client.translation("bad", model=f"{url}/models/en-fr")
    with pytest.raises(HfHubHTTPError, match="no model of this name"):
        client.translation("hello", model=f"{url}/models/nobody")
    for parameters in ({"src_lang": "fr", "tgt_lang": "en"}, {"temperature": 1}):
        answer = httpx.post(f"{url}/models/en-fr", json={"inputs": "a", "parameters": parameters})
        assert answer.status_code in (400, 422) and isinstance(answer.json()["error"], str)


def test_hugging_face_sends_several_at_once(url: str) -> None:
    answer = httpx.post(f"{url}/models/en-fr", json={"inputs": ["a", "b"]}).json()
    assert answer == [{"translation_text": "A"}, {"translation_text": "B"}]
    answer = httpx.post(f"{url}/models/langid", json={"inputs": ["a", "é"]}).json()
    assert [[each["label"] for each in item] for item in answer] == [["en", "fr"], ["fr", "en"]]


def test_answers_name_the_versions_that_gave_them(url: str) -> None:
    asked = {
        "/models/en-fr": ({"inputs": "hello"}, "en-fr"),
        "/v2/translate": ({"text": ["hello"], "target_lang": "FR"}, "en-fr"),
        "/translate": ({"q": "été", "source": "auto", "target": "en"}, "fr-en, langid"),
        "/detect": ({"q": "hello"}, "langid"),
        "/v2/models/en-fr/infer": (
            {"inputs": [{"name": "text", "datatype": "BYTES", "shape": [1], "data": ["hello"]}]},
            "en-fr",
        ),
    }
    versions = {card.name: f"{card.name}@{card.version}" for card, _ in ALL}
    for path, (body, names) in asked.items():
        headers = httpx.post(url + path, json=body).raise_for_status().headers
        assert headers["x-model-version"] == ", ".join(versions[name] for name in names.split(", ")), path
    assert "x-model-version" not in httpx.get(url + "/languages").headers


def test_deepl_translates_and_counts(url: str) -> None:
    client = deepl.DeepLClient("any", server_url=url)
    before = client.get_usage().character.count or 0
    one = client.translate_text("hello", source_lang="EN", target_lang="FR")
    assert isinstance(one, deepl.TextResult)
    assert (one.text, one.detected_source_lang, one.billed_characters) == ("HELLO", "EN", 5)
    many = client.translate_text(["a", " ", "b"], source_lang="EN", target_lang="DE")
    assert isinstance(many, list) and [each.text for each in many] == ["A", " ", "B"]
    assert client.translate_text("été", target_lang="EN-US").text == "ÉTÉ"  # type: ignore[union-attr]
    assert (client.get_usage().character.count or 0) == before + 5 + 2 + 3


def test_deepl_lists_languages_and_gets_its_errors(url: str) -> None:
    client = deepl.DeepLClient("any", server_url=url)
    assert [(each.code, each.name) for each in client.get_source_languages()] == [
        ("EN", "English"),
        ("FR", "French"),
    ]
    assert [each.code for each in client.get_target_languages()] == ["DE", "EN", "FR"]
    with pytest.raises(deepl.DeepLException, match="no model translates between these languages"):
        client.translate_text("a", source_lang="EN", target_lang="JA")
    with pytest.raises(deepl.DeepLException, match="formality is not supported"):
        client.translate_text("a", source_lang="EN", target_lang="FR", formality="more")


def test_libretranslate_translates_detects_and_lists(url: str) -> None:
    client = LibreTranslateAPI(url)
    assert client.translate("hello", "en", "fr") == "HELLO"
    assert client.translate("été", "auto", "en") == "ÉTÉ"
    assert client.detect("été") == [{"language": "fr", "confidence": 90.0}, {"language": "en", "confidence": 10.0}]
    assert client.languages() == [
        {"code": "de", "name": "German", "targets": []},
        {"code": "en", "name": "English", "targets": ["de", "fr"]},
        {"code": "fr", "name": "French", "targets": ["en"]},
    ]
    answer = httpx.post(f"{url}/translate", json={"q": ["a", "b"], "source": "auto", "target": "fr"}).json()
    assert answer["translatedText"] == ["A", "B"] and answer["detectedLanguage"]["language"] == "en"
    refused = httpx.post(f"{url}/translate", json={"q": "a", "source": "en", "target": "fr", "format": "html"})
    assert (refused.status_code, type(refused.json()["error"])) == (400, str)


def test_a_server_without_an_identifier_detects_nothing() -> None:
    with live(edge([(EN_FR, translate), (FR_EN, translate)]).application()) as url:
        refused = httpx.post(f"{url}/detect", data={"q": "a"})
        assert refused.status_code == 404 and "tells languages apart" in refused.json()["error"]
        assert LibreTranslateAPI(url).translate("a", "auto", "fr") == "A"


def test_triton_asks_for_metadata_readiness_and_answers(url: str) -> None:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    assert client.is_server_live() and client.is_server_ready() and client.is_model_ready("en-fr")
    assert not client.is_model_ready("nobody")
    assert client.get_server_metadata()["name"] == "eagleray"
    metadata = client.get_model_metadata("en-fr")
    assert (metadata["versions"], metadata["inputs"][0]["name"]) == ([EN_FR.version], "text")
    found = client.infer("en-fr", [tensor("text", ["a", "b"])], request_id="seven")
    assert found.as_numpy("translation").tolist() == ["A", "B"]
    response = found.get_response()
    assert (response["model_version"], response["id"]) == (EN_FR.version, "seven")
    wanted = [triton.InferRequestedOutput("score", binary_data=False)]
    scores = client.infer("langid", [tensor("text", ["é"])], outputs=wanted)
    assert scores.as_numpy("score") == pytest.approx([0.9]) and scores.as_numpy("label") is None
    image = base64.b64encode(png()).decode()
    assert client.infer("digits", [tensor("image", [image])]).as_numpy("label").tolist() == ["7"]
    client.close()


def test_triton_gets_its_errors(url: str) -> None:
    client = triton.InferenceServerClient(url.removeprefix("http://"))
    for name, given in (("nobody", tensor("text", ["a"])), ("en-fr", tensor("other", ["a"]))):
        with pytest.raises(InferenceServerException):
            client.infer(name, [given])
    with pytest.raises(InferenceServerException, match="it is too long"):
        client.infer("en-fr", [tensor("text", ["bad"])])
    binary = triton.InferInput("text", [1], "BYTES").set_data_from_numpy(np.array(["a"], dtype=np.object_))
    with pytest.raises(InferenceServerException):
        client.infer("en-fr", [binary])
    client.close()


def tensor(name: str, values: list[str]) -> triton.InferInput:
    data = np.array(values, dtype=np.object_)
    return triton.InferInput(name, list(data.shape), "BYTES").set_data_from_numpy(data, binary_data=False)


def test_keys_hold_in_every_dialect(tmp_path: Any) -> None:
    key, kept = new_key("reader", ["translate/en-fr"])
    file = KeyFile(tmp_path / "keys.json")
    file.add(kept)
    gate = Gate(Protection(keys=str(file.path)))
    with live(edge([(EN_FR, translate), (EN_DE, translate)], gate).application()) as url:
        assert InferenceClient(token=key).translation("a", model=f"{url}/models/en-fr").translation_text == "A"
        assert deepl.DeepLClient(key, server_url=url).translate_text("a", target_lang="FR").text == "A"  # type: ignore[union-attr]
        assert LibreTranslateAPI(url, key).translate("a", "en", "fr") == "A"
        assert httpx.post(f"{url}/translate", data={"q": "a", "source": "en", "target": "fr"}).status_code == 401
        wrong = {"q": "a", "source": "en", "target": "fr", "api_key": "x" * 40}
        assert httpx.post(f"{url}/translate", data=wrong).status_code == 401
        for path in ("/models/en-fr", "/v2/translate", "/v2/models/en-fr/infer"):
            assert httpx.post(url + path, json={}).status_code == 401
        with pytest.raises(deepl.AuthorizationException):
            deepl.DeepLClient(key, server_url=url).translate_text("a", target_lang="DE")


PATHS = ("/models/en-fr", "/v2/translate", "/translate", "/detect", "/v2/models/en-fr/infer")
WRONG = b'{"q": {}, "text": {}, "target": 1}'
BODIES = (b"", b"{", b"[]", b"{}", b'{"inputs": 1}', WRONG, b'{"text": "\\ud800"}', b"\xff")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("body", BODIES)
def test_nothing_that_is_sent_fails_the_server(url: str, path: str, body: bytes) -> None:
    for kind in ("application/json", "application/x-www-form-urlencoded", "image/png"):
        answer = httpx.post(url + path, content=body, headers={"content-type": kind})
        assert 400 <= answer.status_code < 500, (kind, answer.text)
