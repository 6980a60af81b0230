"""Committed models of each family, written by one process or by ranks, and ranks that answer with them."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Sequence
from math import prod
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from ranks import RankGroup
from torch import nn

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig, ServeConfig
from eagleray.engine.group import RankSpec, run_rank
from eagleray.engine.group.load import Filling, load_part
from eagleray.models import build_model, model_files, restore_unfilled, stored_tensors
from eagleray.models.plans import parallel_plan
from eagleray.parallel import ParallelOptions, apply_layout, apply_pipeline, build_mesh
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.manifest import MODEL_PREFIX
from eagleray.store.objects import ObjectStore
from eagleray.store.records import create_record
from eagleray.store.runs import RunHandle, epoch_key
from eagleray.store.saver import CheckpointSaver
from eagleray.tasks import load_task

WORDS = ("January", "one", "hour", "two", "minutes", "France", "What", "is", "it?", "and", "30", "5", "Tuesday")
SENTENCES = [
    " ".join(WORDS[(7 * number + 3 * place * (number % 5 + 1)) % len(WORDS)] for place in range(1 + number % 9))
    for number in range(240)
]
TEXTS = [{"text": text, "label": label} for text, label in zip(SENTENCES, ["en", "fr", "de"] * 80, strict=True)]
PAIRS = [{"source": text, "target": text[::-1]} for text in SENTENCES]
IMAGES = [
    {"image": [[(row * column + number) % 256 for column in range(8)] for row in range(8)], "label": number % 3}
    for number in range(60)
]
EXAMPLES: dict[str, Sequence[dict[str, Any]]] = {
    "translation": PAIRS,
    "text-classification": TEXTS,
    "image-classification": IMAGES,
}
SPREADS = {"marian": 0.5, "t5": 0.5, "wide": 0.05}
SEQ2SEQ_SIZES = {"encoder_layers": 2, "decoder_layers": 3} | {
    f"{side}_attention_heads": 4 for side in ("encoder", "decoder")
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "marian": (
        "translation",
        {
            "family": "marian",
            "config": {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64}
            | SEQ2SEQ_SIZES,
        },
    ),
    "wide": (
        "translation",
        {
            "family": "marian",
            "config": {"d_model": 128, "encoder_ffn_dim": 1024, "decoder_ffn_dim": 1024}
            | {"max_position_embeddings": 64}
            | SEQ2SEQ_SIZES,
        },
    ),
    "t5": (
        "translation",
        {"family": "t5", "config": {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}},
    ),
    "bert": (
        "text-classification",
        {"family": "bert", "config": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
         | {"intermediate_size": 64, "max_position_embeddings": 64}},
    ),
    "distilbert": (
        "text-classification",
        {"family": "distilbert", "config": {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 64}
         | {"max_position_embeddings": 64}},
    ),
    "vit": (
        "image-classification",
        {"family": "vit", "config": {"image_size": 8, "patch_size": 4, "hidden_size": 32, "num_hidden_layers": 3}
         | {"num_attention_heads": 4, "intermediate_size": 64}},
    ),
    "own": ("text-classification", {"factory": "own_module:build", "config": {"width": 32, "inner": 64}}),
}  # fmt: skip


def file_of(family: str) -> RunConfig:
    """The file that trained a model."""
    task, model = MODELS[family]
    if task != "image-classification":
        model = model | {"tokenizer": {"vocab_size": 320}}
    return RunConfig.model_validate(
        {
            "name": family,
            "task": task,
            "model": model,
            "data": {"train": "rows.jsonl", "max_source_length": 48, "max_target_length": 20},
            "train": {"max_steps": 10},
        }
    )


def items(family: str) -> list[dict[str, Any]]:
    """Items to be answered."""
    task, _ = MODELS[family]
    columns = load_task(file_of(family)).input_columns
    return [{column: example[column] for column in columns} for example in EXAMPLES[task]]


def commit(family: str, store_dir: Path) -> Checkpoint:
    """Commit a model whose answers differ, from one process."""
    config, store = file_of(family), ObjectStore.open(str(store_dir))
    task = load_task(config)
    processor = task.build_processor(iter(EXAMPLES[config.task]))
    model = build_model(config, processor, "cpu")
    # Decoders must say many different things; what is compared by its scores is as calm as what was trained.
    _vary(model, SPREADS.get(family, 0.2))
    create_record(store, epoch_key(family, 1, 1), {"owner": {"host": "here", "pid": 1}})
    saver = CheckpointSaver(store, _run(store, family), layout=Layout(), config=config)
    files = model_files(model, config, processor)
    saver.save(step=10, tensors=_named(model), files=files, state={"step": 10}, metrics={"loss": 1.0})
    (result,) = saver.wait()
    saver.close()
    assert result.ref is not None, result
    return Checkpoint.open(store, family, "r1-step-00000010")


def commit_again(location: str, family: str, layout: Layout, step: int) -> None:
    """Commit the same weights as ranks of a layout; called by all of them."""
    store = ObjectStore.open(location)
    first = Checkpoint.open(store, family, "r1-step-00000010")
    config, files = first.config(), first.files()
    model = restore_unfilled(config, files)
    plan, fill, device = parallel_plan(model), Filling(model, first), torch.device("cpu")
    mesh = build_mesh(layout, "cpu")
    cut: nn.Module
    if layout.pipeline > 1:
        loss = load_task(config).loss
        options = ParallelOptions()
        cut = apply_pipeline(model, layout, mesh, device, plan=plan, options=options, loss=loss, fill=fill)
    else:
        cut = apply_layout(model, layout, mesh, device, plan=plan, fill=fill)
    saver = CheckpointSaver(
        store if dist.get_rank() == 0 else None, _run(store, family), layout=layout, config=config
    )
    saver.save(step=step, tensors=_named(cut), files=files, state={"step": step}, metrics={"loss": 1.0})
    assert [result.error for result in saver.wait()] == [None]
    saver.close()


def _run(store: ObjectStore, family: str) -> RunHandle:
    return RunHandle(store, family, run=1, epoch=1, attempt="a")


def _named(model: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{MODEL_PREFIX}{name}": tensor for name, tensor in stored_tensors(model).items()}


@torch.no_grad()
def _vary(model: nn.Module, spread: float) -> None:
    """Draw weights with which answers differ."""
    for number, (name, parameter) in enumerate(model.named_parameters()):
        draw = torch.Generator().manual_seed(number)
        if parameter.dim() == 2 and "embed_positions" not in name:
            of = min(0.3, spread) if "shared" in name or "embed" in name else spread
            parameter.copy_(of * torch.randn(parameter.shape, generator=draw))
        elif "bias" in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


class RankProcesses:
    """Ranks of a model as processes of their own: a `Launch`."""

    def __init__(self) -> None:
        self.processes: list[BaseProcess] = []

    def __call__(self, specs: Sequence[RankSpec]) -> RankProcesses:
        context = multiprocessing.get_context("forkserver")
        self.processes = [context.Process(target=run_rank, args=(spec,), daemon=True) for spec in specs]
        for process in self.processes:
            process.start()
        return self

    def check(self) -> None:
        assert all(process.is_alive() for process in self.processes)

    def end(self) -> None:
        for process in self.processes:
            process.join(5)
            process.kill()
            process.join(10)


class RanksOfGroup:
    """Ranks of a model in a long-lived group of processes: a `Launch`."""

    def __init__(self, group: RankGroup) -> None:
        self._group = group

    def __call__(self, specs: Sequence[RankSpec]) -> RanksOfGroup:
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(list(specs),), daemon=True)
        self._thread.start()
        return self

    def check(self) -> None:
        if self._error is not None:
            raise self._error

    def end(self) -> None:
        self._thread.join(30)
        assert not self._thread.is_alive()

    def _run(self, specs: list[RankSpec]) -> None:
        try:
            self._group.run(be_rank, specs)
        except BaseException as error:
            self._error = error


def share_read(location: str, family: str, layout: Layout) -> float:
    """Load this rank's part; return the share of all weights' bytes that it read."""
    checkpoint = Checkpoint.open(ObjectStore.open(location), family, "r1-step-00000010")
    serve = ServeConfig(tensor_parallel_degree=layout.tensor, pipeline_parallel_degree=layout.pipeline)
    part = load_part(checkpoint, layout, serve, torch.device("cpu"))
    sizes = [4 * prod(tensor.shape) for tensor in checkpoint.manifest.tensors]
    return part.num_bytes_read / sum(sizes)


def be_rank(specs: Sequence[RankSpec]) -> None:
    """What every process of the group does."""
    run_rank(specs[dist.get_rank()])
