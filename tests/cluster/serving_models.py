"""Tiny models, committed as training commits them, and the `eagleray serve` command as a process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_model, model_files
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import CheckpointSaver
from eagleray.tasks import load_task
from eagleray.user_code import add_code

CODE = Path(__file__).parent / "serving_code"
START_TIMEOUT_S = 120
MARIAN = {
    "family": "marian",
    "config": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 64,
    },
    "tokenizer": {"vocab_size": 280},
}  # fmt: skip
PAIRS = [{"source": f"{day} July", "target": f"{day} juillet"} for day in range(1, 20)]


def translation(name: str, target: str = "fr", **serve: Any) -> dict[str, Any]:
    """A file of a tiny translator."""
    data = {"train": "rows.jsonl", "target_lang": target, "max_source_length": 48, "max_target_length": 8}
    return {"name": name, "task": "translation", "model": MARIAN, "data": data, "serve": serve}


def echo(name: str, sleep_s: float = 0.0, **serve: Any) -> dict[str, Any]:
    """A file of a user's own task."""
    return {
        "name": name,
        "task": "echo_task:EchoTask",
        "code": [str(CODE)],
        "model": {"factory": "echo_task:build", "config": {"sleep_s": sleep_s}},
        "data": {"train": "rows.jsonl"},
        "serve": serve,
    }


def factor(name: str, **serve: Any) -> dict[str, Any]:
    """A file of a user's own task whose one weight is the factor of its answers."""
    return {**echo(name, **serve), "task": "factor_task:FactorTask", "model": {"factory": "echo_task:build"}}


def commit(file: Mapping[str, Any], store_dir: Path, step: int = 10, *, weight: float | None = None) -> str:
    """Commit a model with random weights, or with one that is given; returns its reference."""
    config = RunConfig.model_validate({**file, "train": {"max_steps": step}})
    add_code(config.code)
    task = load_task(config)
    processor = task.build_processor(iter(PAIRS))
    model = build_model(config, processor, "cpu")
    store = ObjectStore.open(str(store_dir))
    if not store.exists(epoch_key(config.name, 1, 1)):
        create_record(store, epoch_key(config.name, 1, 1), {"owner": {"host": "here", "pid": 1}})
    run = RunHandle(store, config.name, run=1, epoch=1, attempt="a")
    saver = CheckpointSaver(store, run, layout=Layout(1, 1, 1, 1), config=config)
    named = dict(model.named_parameters())
    if weight is not None:
        named["weight"].data.fill_(weight)
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in model.state_dict()}
    tensors = {f"model.{name}": tensor.detach() for name, tensor in {**named, **buffers}.items()}
    files = model_files(model, config, processor)
    saver.save(step=step, tensors=tensors, files=files, state={"step": step}, metrics={"loss": 1.0})
    (result,) = saver.wait()
    saver.close()
    assert result.ref is not None, result
    return result.ref


def write_file(file: Mapping[str, Any], folder: Path) -> Path:
    """Write a file of settings."""
    path = folder / f"{file['name']}.yaml"
    path.write_text(yaml.safe_dump(dict(file)))
    return path


@dataclass
class Command:
    """The `eagleray` command as a user runs it."""

    home: Path
    environment: dict[str, str] = field(default_factory=dict)

    def env(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, "EAGLERAY_HOME": str(self.home), "OMP_NUM_THREADS": "1", **self.environment}

    def start(self, *words: str) -> subprocess.Popen[str]:
        with (self.home.parent / "stderr.log").open("a") as stderr:
            return subprocess.Popen(
                [sys.executable, "-m", "eagleray.cli", *words],
                env=self.env(),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                start_new_session=True,
            )

    def run(self, *words: str, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "eagleray.cli", *words],
            env=self.env(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )

    def serve(self, *words: str) -> tuple[subprocess.Popen[str], dict[str, Any]]:
        """Start a server in the foreground and wait until it says that it answers."""
        process = self.start("serve", *words, "--port", "0", "--json")
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, (self.home.parent / "stderr.log").read_text()[-4000:]
        return process, json.loads(line)


def family(pid: int) -> list[psutil.Process]:
    """A process and everything below it."""
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def wait_gone(processes: list[psutil.Process], timeout_s: float = 30) -> list[str]:
    """Wait until processes are gone; returns what is left."""
    _, alive = psutil.wait_procs(processes, timeout=timeout_s)
    return [f"{each.pid} {each.status()} {' '.join(each.cmdline())[:80]}" for each in alive]


def wait_until(url: str, status: int = 200, timeout_s: float = 30) -> httpx.Response:
    """Ask until an answer has a status."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            response = httpx.get(url)
            if response.status_code == status or time.monotonic() > deadline:
                return response
        except httpx.TransportError:  # a front that is just coming up, or is just replaced
            if time.monotonic() > deadline:
                raise
        time.sleep(0.1)
