"""What is refused before anything is started."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eagleray.config.loader import load_files
from eagleray.errors import StoreURIError, UsageError
from eagleray.resources import count_gpus
from eagleray_jobs.train.preflight import check, check_absolute

FILE = """
name: tiny
task: text-classification
model: {family: bert, config: {hidden_size: 16}}
data: {source: cldr-langid}
train: {max_steps: 2}
resources: {resources_per_worker: {CPU: 900}}
"""


def test_a_relative_store_on_a_joined_cluster_is_refused_with_what_to_give_instead() -> None:
    with pytest.raises(StoreURIError, match=r"the store ./store is a relative path.*\n.*s3://") as caught:
        check_absolute("./store")
    assert caught.value.exit_code == 2
    check_absolute("/shared/store")
    check_absolute("s3://bucket/prefix")


def test_more_than_the_machine_has_is_refused_before_ray_or_torch_are_imported(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    script = """
import sys
from eagleray.cli import main
try:
    main(["train", "run.yaml", "--json"])
finally:
    print(sorted({"ray", "torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert "1 workers x CPU 900 = CPU 900, but this machine has CPU " in done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["error"]["code"] == "resource"
    assert done.stderr.splitlines()[-1] == "[]"
    assert not (tmp_path / "store").exists()


def test_a_run_is_claimed_without_torch() -> None:
    code = "import sys, eagleray_jobs.train.driver; sys.exit(bool({'ray', 'torch', 'pyarrow'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize(
    "key, use_gpu, message",
    [
        ("train.fp16", "auto", "train.fp16 needs GPUs, but this machine has none"),
        ("train.fp16", "false", "train.fp16 needs GPUs, but resources.use_gpu is false; set train.bf16 instead"),
        ("parallel.cpu_offload", "auto", "parallel.cpu_offload needs GPUs, but this machine has none"),
    ],
)
@pytest.mark.skipif(count_gpus() > 0, reason="this machine has a GPU")
def test_what_needs_a_gpu_is_refused_without_one_before_anything_starts(
    key: str, use_gpu: str, message: str, tmp_path: Path
) -> None:
    file = FILE.replace("CPU: 900", "CPU: 0.1") + "parallel: {data_parallel_shard_degree: 2}\n"
    (tmp_path / "run.yaml").write_text(file)
    words = ["train", "run.yaml", f"{key}=true", f"resources.use_gpu={use_gpu}", "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "eagleray.cli", *words], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert message in json.loads(done.stdout.splitlines()[-1])["error"]["message"]
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    "address, message",
    [
        ("127.0.0.1:1", "nothing answers at 127.0.0.1:1: "),
        ("somewhere", "'somewhere' is no address of a Ray cluster"),
        ("ray://somewhere:10001", "cannot drive a run through Ray Client"),
    ],
)
def test_an_address_that_leads_nowhere_is_found_before_the_run_is_claimed(
    address: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(FILE)
    config = load_files([tmp_path / "run.yaml"], [], str(tmp_path / "store"))[0].config
    with pytest.raises(UsageError, match=re.escape(message)):
        check(config, address)
