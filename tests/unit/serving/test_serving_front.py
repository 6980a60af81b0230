"""The front's ports, environment and HAProxy file; the records of servers; the verbs' own decisions."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.errors import ConfigError, ServingError, UsageError
from eagleray_serving.autoscaling import deployment_options, initial_replicas
from eagleray_serving.detached import choose
from eagleray_serving.front import (
    BUFFER_BYTES,
    MAX_FOLDER_CHARACTERS,
    NUM_REPLICA_PORTS,
    Front,
    Ports,
    RequestLimits,
    choose_front,
    environment,
    error_answer,
    joined_environment,
    refusal,
)
from eagleray_serving.haproxy_launcher import (
    ERROR_STATUSES,
    LARGE_BODY_BYTES,
    REFUSED_STATUSES,
    Settings,
    UnknownConfigError,
    rewrite,
)
from eagleray_serving.home import Home, ServerRecord, own_record
from eagleray_serving.plan import reference

WRITTEN = """global
    maxconn 100
defaults
    mode http
    option abortonclose
    retry-on conn-failure
    errorfile 502 /tmp/500.http
    errorfile 503 /tmp/500.http
frontend prometheus
    bind :9101
frontend http_frontend
    bind 127.0.0.1:8000
    default_backend x
listen stats
  bind *:8404
"""
ROUTED = WRITTEN.replace(
    "    default_backend x",
    """    acl is_http-model-own path /v1/predict
    acl is_http-edge path_beg /
    acl is_http-edge path /
    use_backend http-model-own if is_http-model-own
    use_backend http-edge if is_http-edge
    default_backend x
backend http-model-own
backend http-edge""",
)
SETTINGS = Settings("/bin/true", "/errors", 70, 16_384, 900)
LIMITS = RequestLimits(60, 16_384, 900)
TLS = "ssl-min-ver TLSv1.2 alpn http/1.1"


def test_the_written_file_is_edited_in_every_place() -> None:
    lines = [line.strip() for line in rewrite(WRITTEN, SETTINGS).splitlines()]
    assert [line for line in lines if line.startswith("bind ")] == [
        "bind 127.0.0.1:9101",
        "bind 127.0.0.1:8000",
        "bind 127.0.0.1:8404",
    ]
    assert lines.index("option http-buffer-request") < lines.index("frontend prometheus")
    assert "timeout http-request 70s" in lines
    assert "errorfile 503 /errors/503.http" in lines and not any("/tmp/500.http" in line for line in lines)
    rules = [line for line in lines if line.startswith("http-request del-header")]
    assert rules and lines.index(rules[0]) == lines.index("bind 127.0.0.1:8000") + 1


@pytest.mark.parametrize(
    "host, pem, expected",
    [
        ("0.0.0.0", None, ["0.0.0.0:8000"]),
        ("::", None, ["[::]:8000 v4v6"]),
        ("192.0.2.7", None, ["127.0.0.1:8000", "192.0.2.7:8000"]),
        ("::1", None, ["127.0.0.1:8000", "[::1]:8000"]),
        ("192.0.2.7", "/k.pem", [f"{ip}:8000 ssl crt /k.pem {TLS}" for ip in ("127.0.0.1", "192.0.2.7")]),
    ],
)
def test_the_front_alone_listens_where_the_server_is_to(host: str, pem: str | None, expected: list[str]) -> None:
    lines = [line.strip() for line in rewrite(WRITTEN, SETTINGS._replace(host=host, pem=pem)).splitlines()]
    found = [line.removeprefix("bind ") for line in lines if line.startswith("bind ")]
    assert found == ["127.0.0.1:9101", *expected, "127.0.0.1:8404"]


def test_what_the_front_could_not_send_twice_goes_to_the_edge_which_takes_its_time() -> None:
    lines = [line.strip() for line in rewrite(ROUTED, SETTINGS).splitlines()]
    chosen = [line for line in lines if line.startswith("use_backend")]
    assert chosen == [
        "use_backend http-edge if METH_POST is_large",
        "use_backend http-edge if METH_POST wants_lines",
        "use_backend http-model-own if is_http-model-own",
        "use_backend http-edge if is_http-edge",
    ]
    assert lines[lines.index("backend http-edge") + 1] == "timeout server 900s"
    assert LARGE_BODY_BYTES < BUFFER_BYTES - 16_384, "what is not sent to the edge fits, with its headers"


def test_an_edited_file_is_left_as_it_is() -> None:
    once = rewrite(WRITTEN, SETTINGS)
    assert rewrite(once, SETTINGS) == once


@pytest.mark.parametrize("line", ["option abortonclose", "bind :9101", "bind *:8404", "frontend http_frontend"])
def test_a_file_without_an_expected_line_is_refused(line: str) -> None:
    with pytest.raises(UnknownConfigError):
        rewrite(WRITTEN.replace(line, ""), SETTINGS)


@pytest.mark.parametrize("status", ERROR_STATUSES)
def test_an_error_of_the_front_has_our_shape(status: int) -> None:
    head, _, body = error_answer(status).partition(b"\r\n\r\n")
    assert set(json.loads(body)["error"]) == {"code", "message", "hint"}
    assert f"content-length: {len(body)}".encode() in head
    assert head.startswith(b"HTTP/1.1 4" if status < 500 else b"HTTP/1.1 503 ")
    assert (b"retry-after" in head) == (status >= 500)


@pytest.mark.parametrize("status", REFUSED_STATUSES)
def test_what_a_rule_of_the_front_refuses_is_answered_in_our_shape(status: int) -> None:
    assert set(json.loads(refusal(status, 16_384))["error"]) == {"code", "message", "hint"}


def test_ports_are_distinct_and_zero_takes_one_that_no_outgoing_connection_is_given() -> None:
    ports = choose_front(port=0).ports
    chosen = {ports.http, ports.fallback, ports.stats, ports.metrics, ports.first_replica}
    assert len(chosen) == 5
    assert max(chosen) + NUM_REPLICA_PORTS < 32_768  # where Linux begins


def test_a_port_in_use_is_named_with_what_to_do() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServingError, match=f"port {port} on 127.0.0.1 cannot be used") as caught:
            choose_front(port=port)
    assert caught.value.hint is not None and "--port" in caught.value.hint


@pytest.mark.parametrize("host", ["no such host", "256.0.0.1", "a" * 300])
def test_a_host_that_is_no_address_is_a_wrong_call(host: str) -> None:
    with pytest.raises(UsageError, match="--host"):
        choose_front(host, 0)


@pytest.mark.parametrize(
    "host, url",
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("::1", "http://[::1]:80"),
        ("10.0.0.1", "http://10.0.0.1:80"),
    ],
)
def test_the_url_is_one_that_a_client_here_can_use(host: str, url: str) -> None:
    assert Front(host, Ports(80, 1, 2, 3, 4), None).url == url


def test_the_environment_of_haproxy_names_files_that_are_there_and_short_sockets(tmp_path: Path) -> None:
    folder = Path("/tmp") / f"er-{os.getpid()}"
    folder.mkdir()
    try:
        assert len(str(folder)) <= MAX_FOLDER_CHARACTERS
        variables = environment(Front("127.0.0.1", Ports(1, 2, 3, 4, 5), Path("/bin/true")), folder, LIMITS)
        launcher = Path(variables["RAY_SERVE_HAPROXY_BINARY_PATH"])
        assert os.access(launcher, os.X_OK)
        config = folder / "x.cfg"
        config.write_text(WRITTEN)
        done = subprocess.run([launcher, "-db", "-f", config], capture_output=True, text=True, timeout=20)
        assert (done.returncode, done.stderr) == (0, "")
        assert "http-buffer-request" in config.read_text()
        socket_path = f"{folder}/h/{'0' * 56}/metrics.sock"
        assert len(socket_path) <= 97
    finally:
        subprocess.run(["rm", "-r", str(folder)], check=True)


def test_without_haproxy_no_setting_of_it_is_made(tmp_path: Path) -> None:
    variables = environment(Front("127.0.0.1", Ports(1, 2, 3, 4, 5), None), Path("/tmp/x"), LIMITS)
    assert not any("HAPROXY" in name or "HA_PROXY" in name for name in variables)


def test_a_joined_cluster_gets_the_lossless_settings_without_a_file_of_ours() -> None:
    variables = joined_environment()
    if "RAY_SERVE_ENABLE_HA_PROXY" in variables:
        assert "option http-buffer-request" in variables["RAY_SERVE_HAPROXY_RETRY_ON"].splitlines()[1]
        assert not any("/" in value for value in variables.values())


def test_autoscaling_words_become_serves() -> None:
    serve = ServeConfig.model_validate({"autoscaling_config": {"min_replicas": 0, "max_replicas": 7}})
    scaling = deployment_options(serve)["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["upscale_delay_s"]) == (0, 7, 2.0)
    assert scaling["policy"]["policy_kwargs"] == {"target_queued_tokens": 8192}
    assert "initial_replicas" not in scaling and "num_replicas" not in deployment_options(serve)
    assert initial_replicas(serve) == 0


def test_a_fixed_number_of_replicas_is_not_autoscaled() -> None:
    options = deployment_options(ServeConfig(num_replicas=3))
    assert options["logging_config"] == {"enable_access_log": False}
    assert (options["num_replicas"], "autoscaling_config" in options) == (3, False)
    assert initial_replicas(ServeConfig(num_replicas=3)) == 3


@pytest.mark.parametrize(
    "ref, expected",
    [
        (None, "m"),
        ("@best", "m@best"),
        ("@step-100", "m@step-100"),
        ("m@r1-step-00000010", "m@r1-step-00000010"),
        ("m", "m"),
        ("other@best", None),
    ],
)
def test_the_reference_of_a_file(ref: str | None, expected: str | None) -> None:
    config = RunConfig.model_validate(
        {
            "name": "m",
            "task": "translation",
            "model": {"family": "marian"},
            "data": {"source": "cldr-en-fr"},
            "serve": {"ref": ref},
        }
    )
    if expected is None:
        with pytest.raises(ConfigError, match=r"serve\.ref"):
            reference(config)
    else:
        assert reference(config) == expected


def record(id: str, **changes: Any) -> ServerRecord:
    return replace(own_record(id, Path("/nonexistent"), "http://x", ["edge"], ["m@v"], None), **changes)


def test_a_record_is_read_back_and_one_whose_process_is_gone_is_cleared_away(tmp_path: Path) -> None:
    home = Home(tmp_path)
    mine = record("a", state="ready")
    home.write(mine)
    home.write(record("b", created=1.0))  # the pid of this process, but another process
    assert home.records() == [mine]
    assert home.read("b") is None


def test_a_killed_server_on_a_joined_cluster_is_shown_as_abandoned(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.write(record("a", created=1.0, address="10.0.0.1:6379", folder=None, state="ready"))
    home.write(record("b", pid=None, created=None, address="10.0.0.1:6379", folder=None, state="ready"))
    assert {found.id: found.state for found in home.records()} == {"a": "abandoned", "b": "ready"}


def test_a_failed_record_stays_for_whoever_waits_and_is_no_server(tmp_path: Path) -> None:
    home = Home(tmp_path)
    home.update(record("a"), "failed", {"message": "m"})
    assert home.records() == []
    assert home.read("a") is not None


@pytest.mark.parametrize("text", ["", "{", "[]", '{"id": "a"}'])
def test_a_record_that_cannot_be_read_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "serve").mkdir()
    (tmp_path / "serve" / "a.json").write_text(text)
    assert Home(tmp_path).records() == []


def test_stop_needs_a_name_only_where_several_run() -> None:
    one, two = record("a"), record("b")
    assert choose([one], None, all=False) == [one]
    assert choose([], None, all=False) == []
    assert choose([one, two], "b", all=False) == [two]
    assert choose([one, two], None, all=True) == [one, two]
    with pytest.raises(UsageError, match="2 servers run"):
        choose([one, two], None, all=False)
    with pytest.raises(UsageError, match="no server 'c'"):
        choose([one], "c", all=False)


def cli(*words: str, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "eagleray.cli", *words],
        env={**os.environ, "EAGLERAY_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_what_is_no_verb_of_serve_is_a_file(tmp_path: Path) -> None:
    done = cli("serve", "missing.yaml", "--json", home=tmp_path)
    assert (done.returncode, "missing.yaml" in json.loads(done.stdout)["error"]["message"]) == (2, True)
    done = cli("serve", "--port", "1", "missing.yaml", home=tmp_path)
    assert (done.returncode, "missing.yaml" in done.stderr) == (2, True)


def test_status_and_stop_without_a_server_say_so(tmp_path: Path) -> None:
    done = cli("serve", "status", "--json", home=tmp_path)
    assert (done.returncode, json.loads(done.stdout)) == (0, {"servers": []})
    assert cli("serve", "stop", home=tmp_path).stdout.strip() == "no server runs"


def test_a_second_signal_at_once_is_the_same_request() -> None:
    """`timeout` sends its signal to the process and again to the group; that must not cut the clean end short."""
    script = """
import os, signal, time
from eagleray_serving.server import StopRequest
stop = StopRequest(); stop.install()
def alive():
    for _ in range(2): os.kill(os.getpid(), signal.SIGTERM)
    return True
stop.wait(alive)
print("ended in order", flush=True)
time.sleep(1.1); os.kill(os.getpid(), signal.SIGTERM); time.sleep(5)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("ended in order\n", -signal.SIGTERM), done.stderr
