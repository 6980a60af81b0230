"""Servers for benchmarks: models committed as training commits them, and `eagleray serve` as a process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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

NOOP_CODE = Path(__file__).parent / "noop"
STOP_TIMEOUT_S = 90
WORDS = "the ray swims over warm seas in quiet formation and turns where currents meet beside an old reef".split()


def noop_file(**serve: Any) -> dict[str, Any]:
    """Return the file of a model that does nothing."""
    return {
        "name": "noop",
        "task": "noop_task:NoopTask",
        "code": [str(NOOP_CODE)],
        "model": {"factory": "noop_task:build"},
        "data": {"train": "rows.jsonl"},
        "serve": serve,
    }


def translation_file(**serve: Any) -> dict[str, Any]:
    """Return the file of a small translator; its weights are random, its answers as long as they may be."""
    model = {
        "family": "marian",
        "config": {
            "d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024,
            "max_position_embeddings": 128,
        },
        "tokenizer": {"vocab_size": 400},
    }  # fmt: skip
    data = {"train": "rows.jsonl", "target_lang": "fr", "max_source_length": 96, "max_target_length": 24}
    return {"name": "en-fr", "task": "translation", "model": model, "data": data, "serve": serve}


def sentences(count: int) -> list[str]:
    """Return sentences of 4 to 14 words, the same every time."""
    return [
        " ".join(WORDS[(number * 7 + place * 3) % len(WORDS)] for place in range(4 + number % 11))
        for number in range(count)
    ]


def commit(file: Mapping[str, Any], folder: Path) -> Path:
    """Commit a model with its first weights; return the path of its file."""
    store_dir = folder / "store"
    config = RunConfig.model_validate({**file, "train": {"max_steps": 1}})
    add_code(config.code)
    task = load_task(config)
    processor = task.build_processor({"source": text, "target": text} for text in sentences(200))
    model = build_model(config, processor, "cpu")
    store = ObjectStore.open(str(store_dir))
    create_record(store, epoch_key(config.name, 1, 1), {"owner": {"host": "bench", "pid": os.getpid()}})
    saver = CheckpointSaver(
        store, RunHandle(store, config.name, 1, 1, "a"), layout=Layout(1, 1, 1, 1), config=config
    )
    named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    kept = model.state_dict().keys()
    tensors = {f"model.{name}": tensor.detach() for name, tensor in named.items() if name in kept}
    files = model_files(model, config, processor)
    saver.save(step=1, tensors=tensors, files=files, state={"step": 1}, metrics={"loss": 1.0})
    saver.wait()
    saver.close()
    path = folder / f"{config.name}.yaml"
    path.write_text(yaml.safe_dump({**file, "store": str(store_dir)}))
    return path


@contextmanager
def serving(path: Path, *words: str, num_threads: int = 1) -> Iterator[str]:
    """Serve a file; give the URL."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"EAGLERAY_HOME": str(path.parent / "home"), "OMP_NUM_THREADS": str(num_threads)}
    command = [sys.executable, "-m", "eagleray.cli", "serve", str(path), *words, "--port", "0", "--json"]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("eagleray serve did not start; its reason is above")
        yield json.loads(line)["url"]
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
