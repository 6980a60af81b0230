"""Joining and starting Ray."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from ray_cluster import RayCluster

from eagleray.cluster import connect
from eagleray.errors import UsageError

LOCAL = """
import os, signal, sys
from eagleray.cluster import connect
with connect() as cluster:
    import ray
    print(cluster.is_local, int(ray.cluster_resources()["CPU"]), cluster.address, flush=True)
    {body}
"""


def run_script(script: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_process_joins_by_address_runs_the_clusters_own_ray_and_ships_packages_and_code(
    ray_cluster: RayCluster, ray_environment: dict[str, str], tmp_path: Path
) -> None:
    package = tmp_path / "code" / "shipped_words"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("WORD = 'manta'\n")
    script = f"""
import ray, tempfile
from pathlib import Path
from eagleray.shipping import runtime_env
with tempfile.TemporaryDirectory() as staging:
    env = runtime_env(Path(staging), [{str(tmp_path / "code")!r}])
    ray.init({ray_cluster.address!r}, runtime_env=env, log_to_driver=False)
@ray.remote(num_cpus=0)
def look():
    import eagleray, eagleray_jobs, ray, shipped_words
    from importlib.metadata import distribution
    verbs = distribution("eagleray").entry_points.select(group="eagleray.commands")
    return ray.__file__, eagleray.__file__, shipped_words.WORD, sorted(verb.name for verb in verbs)
there = ray.get(look.remote(), timeout=100)
assert there[0] == ray.__file__, there
assert "py_modules_files" in there[1], there
assert there[2:] == ("manta", ["jobs", "platform", "serving"]), there
"""
    done = run_script(script, ray_environment)
    assert done.returncode == 0, done.stderr


def test_a_local_ray_is_quiet_and_ends_with_its_process_also_after_sigterm(
    ray_environment: dict[str, str],
) -> None:
    # Without a mode of its own, Ray chooses token authentication for a local cluster, and says so.
    plain = {name: value for name, value in ray_environment.items() if not name.startswith("RAY_AUTH")}
    done = run_script(LOCAL.format(body="os.kill(os.getpid(), signal.SIGTERM)"), plain)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    is_local, cpus, address = done.stdout.split()
    assert is_local == "True" and int(cpus) <= (os.cpu_count() or 1)
    assert done.stderr == ""
    assert _does_not_answer(address)


def _does_not_answer(address: str) -> bool:
    host, port = address.rsplit(":", 1)
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) != 0


def test_an_address_that_does_not_answer_is_an_error_of_the_call() -> None:
    with pytest.raises(UsageError, match=r"nothing answers at 127.0.0.1:1: "), connect("127.0.0.1:1"):
        pass
