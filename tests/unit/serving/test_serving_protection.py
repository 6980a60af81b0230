"""Who may open a server to a network, with which keys and certificate; and the verbs that make keys."""

from __future__ import annotations

import json
import os
import ssl
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from real_front import real_front
from serving_fakes import EN_FR, service
from starlette.types import ASGIApp

from eagleray.config.schema import ServeConfig
from eagleray.errors import ServingError, UsageError
from eagleray_serving.front import Front, Ports
from eagleray_serving.keys import KeyFile, KeyRing, new_key
from eagleray_serving.plan import ModelPlan
from eagleray_serving.protection import Certificate, EdgeOptions, Protection, edge_options, is_loopback
from eagleray_serving.render import render

SECRET = "k" * 40


def decide(
    home: Path, host: str = "127.0.0.1", environ: dict[str, str] | None = None, **options: Any
) -> EdgeOptions:
    return edge_options(host, home=home, environ=environ or {}, **{"keys": None, "insecure": False, **options})


def with_key(path: Path) -> Path:
    KeyFile(path).add(new_key("one", ["translate"])[1])
    return path


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Certificate, ssl.SSLContext]:
    """A certificate for 127.0.0.1, and what trusts the one that signed it."""
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    for part in made.cert_chain_pems:
        part.write_to_path(tmp_path / "chain.pem", append=True)
    made.private_key_pem.write_to_path(tmp_path / "key.pem")
    trust = ssl.create_default_context()
    authority.configure_trust(trust)
    return Certificate(tmp_path / "chain.pem", tmp_path / "key.pem"), trust


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org"])
def test_without_keys_only_loopback_is_opened_unless_it_is_said_twice(tmp_path: Path, host: str) -> None:
    with pytest.raises(UsageError, match="it has no keys") as caught:
        decide(tmp_path, host)
    assert caught.value.hint is not None and "--insecure-no-keys" in caught.value.hint
    assert not decide(tmp_path, host, insecure=True).has_keys
    assert decide(tmp_path, host, keys=with_key(tmp_path / "keys.json")).has_keys


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(tmp_path: Path, host: str) -> None:
    assert is_loopback(host) and not decide(tmp_path, host).has_keys


def test_the_users_own_keys_are_used_where_there_are_some(tmp_path: Path) -> None:
    with_key(tmp_path / "keys.json")
    assert decide(tmp_path).keys == tmp_path / "keys.json"
    assert not decide(tmp_path, insecure=True).has_keys
    other = with_key(tmp_path / "other.json")
    assert decide(tmp_path, keys=other).keys == other


def test_keys_of_the_environment_are_hashed_into_the_servers_folder(tmp_path: Path) -> None:
    found = decide(tmp_path, "0.0.0.0", {"EAGLERAY_API_KEYS": f"ci={SECRET}"})
    protection = found.protection(None, tmp_path)
    assert protection.keys is not None
    kept = Path(protection.keys)
    assert SECRET not in kept.read_text() and stat.S_IMODE(kept.stat().st_mode) == 0o600
    assert KeyRing(KeyFile(kept)).find(SECRET) is not None
    assert SECRET not in " ".join(found.words)


@pytest.mark.parametrize(
    "options, environ, message",
    [
        ({"keys": Path("/nothing"), "insecure": True}, {}, "contradict"),
        ({"is_joining": True}, {"EAGLERAY_API_KEYS": f"a={SECRET}"}, "does not reach the replicas"),
        ({"tls": (Path("/a"), None)}, {}, "go together"),
        ({"tls": (Path("/a"), Path("/b"))}, {}, "no certificate and its key"),
        ({"tls": (Path("/a"), Path("/b")), "is_joining": True}, {}, "not ours to set up"),
    ],
)
def test_what_contradicts_itself_is_a_wrong_call(
    tmp_path: Path, options: dict[str, Any], environ: dict[str, str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        decide(tmp_path, environ=environ, **options)


def test_a_file_without_a_key_is_a_wrong_call_and_one_that_is_not_there_a_failure(tmp_path: Path) -> None:
    KeyFile(tmp_path / "keys.json").write([])
    with pytest.raises(UsageError, match="holds no key"):
        decide(tmp_path)
    with pytest.raises(ServingError, match="cannot be read"):
        decide(tmp_path, keys=tmp_path / "nothing.json")


def test_a_certificate_of_another_key_is_a_wrong_call(
    tmp_path: Path, certificate: tuple[Certificate, ssl.SSLContext]
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().issue_cert("127.0.0.1").private_key_pem.write_to_path(other)
    certificate[0].check()
    with pytest.raises(UsageError, match="no certificate and its key"):
        Certificate(certificate[0].chain, other).check()


def test_the_words_of_another_process_mean_the_same(
    tmp_path: Path, certificate: tuple[Certificate, ssl.SSLContext]
) -> None:
    made = certificate[0]
    found = decide(
        tmp_path,
        keys=with_key(tmp_path / "k.json"),
        tls=(made.chain, made.key),
        access_log="none",
        log_addresses=True,
    )
    assert found.words == (
        "--keys", str(tmp_path / "k.json"), "--tls-cert", str(made.chain), "--tls-key", str(made.key),
        "--access-log", "none", "--log-addresses",
    )  # fmt: skip
    assert found.protection(tmp_path / "x.log") == Protection(str(tmp_path / "k.json"), None, True)
    assert decide(tmp_path).protection(tmp_path / "x.log").access_log == str(tmp_path / "x.log")
    assert decide(tmp_path, insecure=True).words == ("--insecure-no-keys",)


def test_a_rendered_config_names_the_file_and_no_hash(tmp_path: Path) -> None:
    keys = with_key(tmp_path / "keys.json")
    protection = decide(tmp_path, keys=keys).protection(None)
    plan = ModelPlan("/store", EN_FR, ("text",), ServeConfig(), protection=protection)
    rendered = render([plan], "0.0.0.0", 8000)
    assert str(keys) in rendered and KeyFile(keys).read()[0].sha256 not in rendered
    assert ModelPlan.from_args(plan.as_args()) == plan


def test_the_url_of_a_server_with_a_certificate_is_https(certificate: tuple[Certificate, ssl.SSLContext]) -> None:
    assert Front("0.0.0.0", Ports(80, 1, 2, 3, 4), None, certificate[0]).url == "https://127.0.0.1:80"


def echo() -> ASGIApp:
    return service(EN_FR).application()


def test_the_front_speaks_tls_and_a_client_that_verifies_is_content(
    tmp_path: Path, certificate: tuple[Certificate, ssl.SSLContext]
) -> None:
    made, trust = certificate
    pem = tmp_path / "both.pem"
    pem.write_bytes(made.pem())
    with real_front(echo(), tmp_path, pem=str(pem)) as front:
        url = f"https://127.0.0.1:{front.port}/v1/translate"
        answer = httpx.post(url, json={"text": "a"}, verify=trust)
        assert (answer.status_code, answer.json()["translations"]) == (200, [{"text": "A"}])
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE"):
            httpx.post(url, json={"text": "a"})
        with pytest.raises(httpx.HTTPError):
            httpx.post(url.replace("https", "http"), json={"text": "a"})
        old = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        old.check_hostname, old.verify_mode = False, ssl.CERT_NONE
        old.set_ciphers("ALL:@SECLEVEL=0")
        old.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
        old.maximum_version = ssl.TLSVersion.TLSv1_2
        assert httpx.get(url, verify=old).status_code == 405


def test_rays_python_proxy_takes_the_same_certificate(certificate: tuple[Certificate, ssl.SSLContext]) -> None:
    from ray.serve.config import HTTPOptions

    made = certificate[0]
    options = HTTPOptions(ssl_certfile=str(made.chain), ssl_keyfile=str(made.key))
    assert (options.ssl_certfile, options.ssl_keyfile) == (str(made.chain), str(made.key))


def cli(home: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eagleray.cli", *words],
        env={**os.environ, "EAGLERAY_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_key_is_shown_once_listed_by_name_and_removed(tmp_path: Path) -> None:
    added = cli(tmp_path, "keys", "add", "ci", "--scope", "translate/en-fr", "--tokens-per-s", "500", "--json")
    made = json.loads(added.stdout)
    assert (added.returncode, made["name"], made["scopes"]) == (0, "ci", ["translate/en-fr"])
    assert KeyRing(KeyFile(tmp_path / "keys.json")).find(made["key"]) is not None
    listed = cli(tmp_path, "keys", "list")
    assert "ci" in listed.stdout and made["key"] not in listed.stdout
    assert KeyFile(tmp_path / "keys.json").read()[0].sha256 not in listed.stdout
    assert cli(tmp_path, "keys", "remove", "ci").returncode == 0
    again = cli(tmp_path, "keys", "remove", "ci")
    assert (again.returncode, "no key named 'ci'" in again.stderr) == (2, True)


def test_an_open_server_without_keys_is_refused_before_anything_starts(tmp_path: Path) -> None:
    file = Path(__file__).parents[3] / "configs" / "en-fr.yaml"
    done = cli(tmp_path, "serve", str(file), "--host", "0.0.0.0", "--json")
    assert (done.returncode, "has no keys" in json.loads(done.stdout)["error"]["message"]) == (2, True)
    done = cli(tmp_path, "serve", "render", str(file), "--host", "0.0.0.0", "--json")
    assert (done.returncode, "has no keys" in json.loads(done.stdout)["error"]["message"]) == (2, True)
