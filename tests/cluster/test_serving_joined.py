"""Models on a cluster that runs already: by `--address`, and by Ray's own `serve deploy`."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path

import httpx
import pytest
import yaml
from ray_cluster import RayCluster, free_port
from serving_models import Command, commit, echo, wait_until, write_file

SMALL = {"ray_actor_options": {"num_cpus": 0.25}}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a store and the file of one model."""
    folder = tmp_path_factory.mktemp("joined")
    file = echo("own", **SMALL)
    commit(file, folder / "store")
    write_file({**file, "store": str(folder / "store")}, folder)
    return folder


@pytest.fixture
def command(models: Path, tmp_path: Path) -> Command:
    return Command(tmp_path / "home")


def joining(command: Command, environment: Mapping[str, str]) -> Command:
    ray = {name: value for name, value in environment.items() if name.startswith("RAY_AUTH")}
    return Command(command.home, ray)


def test_a_server_on_a_joined_cluster_answers_and_takes_only_itself_away(
    ray_cluster: RayCluster, ray_environment: dict[str, str], models: Path, command: Command
) -> None:
    there = joining(command, ray_environment)
    process = there.start(
        "serve", str(models / "own.yaml"), "--address", ray_cluster.address, "--port", str(free_port()), "--json"
    )
    assert process.stdout is not None
    info = json.loads(process.stdout.readline())
    assert "url" in info, (info, (command.home.parent / "stderr.log").read_text()[-3000:])
    assert httpx.post(info["url"] + "/v1/predict", json={"inputs": [1]}, timeout=30).status_code == 200
    process.send_signal(signal.SIGINT)
    assert process.wait(90) == 0
    process.stdout.close()
    assert wait_until(info["url"] + "/v1/models", 404).status_code == 404


@pytest.mark.slow
def test_what_a_killed_server_left_on_a_joined_cluster_does_not_stop_the_next_one(
    ray_cluster: RayCluster, ray_environment: dict[str, str], models: Path, command: Command
) -> None:
    there = joining(command, ray_environment)
    words = (
        "serve",
        str(models / "own.yaml"),
        "--address",
        ray_cluster.address,
        "--port",
        str(free_port()),
        "--json",
    )
    killed = there.start(*words)
    assert killed.stdout is not None
    url = json.loads(killed.stdout.readline())["url"]
    killed.kill()
    killed.wait(10)
    killed.stdout.close()
    (left,) = json.loads(there.run("serve", "status", "--json").stdout)["servers"]
    assert left["state"] == "abandoned"

    again = there.start(*words)
    assert again.stdout is not None
    assert json.loads(again.stdout.readline())["url"] == url
    assert httpx.post(url + "/v1/predict", json={"inputs": [1]}, timeout=30).status_code == 200
    again.kill()
    again.wait(10)
    again.stdout.close()

    stopped = there.run("serve", "stop", "--all")
    assert stopped.returncode == 0, stopped.stderr
    assert wait_until(url + "/v1/models", 404).status_code == 404
    assert json.loads(there.run("serve", "status", "--json").stdout)["servers"] == []


def test_the_rendered_config_is_taken_by_rays_own_serve_deploy(
    ray_cluster: RayCluster, ray_environment: dict[str, str], models: Path, command: Command
) -> None:
    from ray.serve.schema import ServeDeploySchema

    rendered = command.run("serve", "render", str(models / "own.yaml"), "--port", str(free_port()))
    assert rendered.returncode == 0, rendered.stderr
    config = yaml.safe_load(rendered.stdout)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # metrics_interval_s, without which our look-back is refused
        schema = ServeDeploySchema.model_validate(config)
    assert [application.route_prefix for application in schema.applications] == ["/v1/predict", "/"]
    assert config["http_options"]["host"] == "127.0.0.1"

    path = command.home.parent / "serve.yaml"
    path.write_text(rendered.stdout)
    serve = Path(sys.executable).with_name("serve")
    deployed = subprocess.run(
        [serve, "deploy", "--address", ray_cluster.dashboard, path],
        env=ray_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert deployed.returncode == 0, deployed.stderr
    # Serve's own options are those of its first start on a cluster: ask it where it listens.
    headers = {"authorization": f"Bearer {ray_environment['RAY_AUTH_TOKEN']}"}
    options = httpx.get(f"{ray_cluster.dashboard}/api/serve/applications/", headers=headers, timeout=30).json()
    url = f"http://127.0.0.1:{options['http_options']['port']}"
    try:
        assert wait_until(url + "/readyz", timeout_s=90).status_code == 200
        assert httpx.post(url + "/v1/predict/own", json={"inputs": [1]}, timeout=30).status_code == 200
    finally:
        down = [serve, "shutdown", "--address", ray_cluster.dashboard, "-y"]
        subprocess.run(down, env=ray_environment, check=True, capture_output=True, timeout=120)
