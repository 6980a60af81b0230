"""Verbs as jobs of a real cluster."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from ray_cluster import RayCluster

from eagleray.store.objects import ObjectStore
from eagleray_jobs.submit.api import RayJobs
from eagleray_jobs.submit.parcel import Parcel, pack
from eagleray_jobs.submit.records import JobRecords
from eagleray_jobs.submit.service import Jobs

FILE = """\
name: en-fr
task: translation
model: {family: marian}
data: {source: cldr-en-fr}
train: {max_steps: 9}
"""


def eagleray(*arguments: str | Path, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "eagleray.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def test_a_job_runs_with_the_clusters_python_and_ray_and_leaves_its_record(
    ray_cluster: RayCluster, tmp_path: Path
) -> None:
    """The cluster's PATH leads to no Python that has Ray; its own interpreter has to be found."""
    file = tmp_path / "file.yaml"
    file.write_text(FILE)
    store = tmp_path / "store"
    packed = pack("train", [str(file)], str(store))
    parcel = Parcel("validate", packed.arguments, packed.files, packed.loaded, packed.store)
    job_id = Jobs(JobRecords(ObjectStore.open(str(store))), RayJobs).submit(parcel, ray_cluster.dashboard).id
    followed = eagleray("jobs", "logs", job_id, "--follow", "--store", store)
    assert followed.returncode == 0, followed.stdout + followed.stderr
    assert followed.stdout.endswith(f"{job_id}: succeeded\n")
    assert followed.stderr == ""
    known = json.loads(eagleray("jobs", "status", job_id, "--store", store, "--json").stdout)
    assert (known["state"], known["exit_status"]) == ("succeeded", 0)
    assert known["result"]["files"][0]["config"]["train"]["max_steps"] == 9
    assert f"Running entrypoint for job {job_id}" in eagleray("jobs", "logs", job_id, "--store", store).stdout
