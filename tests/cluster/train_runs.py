"""The command line as a process, and a small run for it: 36 steps of two workers, dropout on, a commit every 4."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from eagleray.store.objects import ObjectStore

CODE = Path(__file__).parent / "code"
MAX_STEPS = 36
LAST = f"words@r1-step-{MAX_STEPS:08d}"
STEP_S = 0.25
"""What `slow_words` sleeps in a step."""
TIMEOUT_S = 240.0

FILE = """
name: words
task: {task}
code: [{code}]
model:
  factory: slow_words.encoder:build
  tokenizer: {{type: bpe, vocab_size: 300}}
data: {{train: {data}, max_source_length: 16}}
train:
  {{max_steps: {max_steps}, global_batch_size: 8, learning_rate: 1.0e-3, logging_steps: 1, save_steps: 4, seed: 7}}
parallel: {{data_parallel_replicate_degree: 2}}
resources: {{resources_per_worker: {{CPU: 0.5}}, use_gpu: false}}
"""


def write_run(folder: Path, task: str = "slow_words:SlowWords", bucket: str | None = None) -> Path:
    """Write the file and its data, the same content everywhere; the data into a bucket where one is given."""
    words = ("manta", "eagle", "cownose", "spotted", "devil", "stingray")
    rows = [
        {"text": f"{words[i % 6]} {words[(i * i) % 6]} {i}", "label": ("even", "odd")[i % 2]} for i in range(200)
    ]
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row) + "\n" for row in rows)
    data = f"{bucket or folder}/train.jsonl"
    if bucket is None:
        Path(data).write_text(text)
    else:
        open_store(bucket).put("train.jsonl", text.encode())
    path = folder / "words.yaml"
    path.write_text(FILE.format(task=task, code=CODE, data=data, max_steps=MAX_STEPS))
    return path


def open_store(store: Path | str) -> ObjectStore:
    from eagleray.store.objects import ObjectStore

    return ObjectStore.open(str(store))


@dataclass(frozen=True)
class Done:
    """How a call of the command line ended; `value` is the object that `--json` prints."""

    status: int
    value: dict[str, Any]
    stderr: str


@dataclass(frozen=True)
class FinishedRun:
    """The run that nobody disturbed."""

    file: Path
    store: Path
    done: Done
    weights: dict[str, torch.Tensor]


class CommandLine:
    """`eagleray ... --json` in a process of its own."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def run(self, *arguments: object) -> Done:
        with self.start(*arguments) as process:
            return finish(process)

    @contextmanager
    def start(self, *arguments: object, own_group: bool = False) -> Iterator[subprocess.Popen[str]]:
        """Start a call, in a process group of its own if so; it ends with the context if not by itself."""
        command = [sys.executable, "-m", "eagleray.cli", *map(str, arguments), "--json"]
        process = subprocess.Popen(
            command,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=own_group,
        )
        with process:
            try:
                yield process
            finally:
                if process.poll() is None:
                    process.kill()


def finish(process: subprocess.Popen[str]) -> Done:
    """Wait for a call."""
    stdout, stderr = process.communicate(timeout=TIMEOUT_S)
    lines = stdout.splitlines()
    return Done(process.returncode, json.loads(lines[-1]) if lines else {}, stderr)


def await_commit(store: Path | str, step: int, process: subprocess.Popen[str]) -> None:
    """Wait until a run of `words` has committed a step (metrics come seconds later), and a random while."""
    opened, manifest = open_store(store), f"models/words/r1-step-{step:08d}/manifest.json"
    await_condition(lambda: opened.exists(manifest), process)
    time.sleep(random.uniform(0, 4) * STEP_S)


def await_condition(is_met: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    """Wait for a condition while a call goes on."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_met():
        assert process.poll() is None, finish(process).stderr
        assert time.monotonic() < deadline
        time.sleep(0.05)


def metrics(store: Path | str, run: int = 1) -> list[dict[str, Any]]:
    """Read `metrics.jsonl` of a run of `words`, without a last line that is just being written."""
    opened, key = open_store(store), f"runs/words/r{run}/metrics.jsonl"
    if not opened.exists(key):
        return []
    return [json.loads(line) for line in opened.get(key).decode().split("\n")[:-1]]


def weights(store: Path | str, ref: str, *prefixes: str) -> dict[str, torch.Tensor]:
    """Read the tensors of a version; without prefixes all of them, the optimizer's too."""
    from eagleray.store.registry import Registry

    checkpoint = Registry(open_store(store)).open(ref)
    assert checkpoint.verify() == []
    return {
        name: tensor
        for prefix in prefixes or ("model.", "optim.")
        for name, tensor in checkpoint.tensors(prefix).items()
    }


def assert_bitwise_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    import torch

    assert ours.keys() == theirs.keys() and len(ours) > 20
    different = [name for name in ours if not torch.equal(ours[name], theirs[name])]
    assert not different
