"""Adapters train in every layout as in one process, and go from one layout to another."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from runs import assert_same, in_layout, one_process
from training import Job, checkpoint_tensors, examples_of, make_config, train

from eagleray.config.layout import Layout
from eagleray.config.schema import AdapterConfig, RunConfig
from eagleray.models import build_model
from eagleray.parallel import ParallelOptions
from eagleray.tasks import load_task

Groups = Callable[[int], RankGroup]
P = ParallelOptions

# Each has a Linear that is cut by its rows, one by its columns, and one that is whole.
ADAPTERS = {
    "marian": AdapterConfig(rank=3, target_modules=["q_proj", "encoder.layers.*.fc2"], modules_to_save=[]),
    "t5": AdapterConfig(rank=3, target_modules=["wi", "SelfAttention.o", "EncDecAttention.q"]),
    "distilbert": AdapterConfig(
        rank=3, target_modules=["v_lin", "out_lin", "pre_classifier"], modules_to_save=["classifier"]
    ),
}
CASES = {
    "marian-ddp2": ("marian", Layout(replicate=2), P()),
    "t5-fsdp2": ("t5", Layout(shard=2), P(activation_checkpointing="full")),
    "distilbert-tp2": ("distilbert", Layout(tensor=2), P(sequence_parallel=True)),
    "marian-pp2": ("marian", Layout(pipeline=2), P()),
    "t5-tp2": ("t5", Layout(tensor=2), P()),
}
SLOW = {
    "marian-tp2": ("marian", Layout(tensor=2), P(sequence_parallel=True)),
    "distilbert-fsdp2.tp2": ("distilbert", Layout(shard=2, tensor=2), P()),
    "t5-pp2.tp2": ("t5", Layout(pipeline=2, tensor=2), P()),
    "marian-pp2.fsdp2": ("marian", Layout(pipeline=2, shard=2), P()),
    "distilbert-pp2-zbv": ("distilbert", Layout(pipeline=2), P(schedule="ZBVZeroBubble")),
    "distilbert-hsdp2x2": ("distilbert", Layout(replicate=2, shard=2), P()),
    "t5-pp2-interleaved": ("t5", Layout(pipeline=2), P(schedule="Interleaved1F1B")),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_an_adapter_trains_in_a_layout_as_in_one_process(group: Groups, case: str) -> None:
    family, layout, options = (CASES | SLOW)[case]
    changes = {"adapter": ADAPTERS[family]}
    found = group(layout.num_workers).run(in_layout, family, layout, options, 3, changes, timeout_s=240.0)[0]
    expected = one_process(family, **changes)
    assert expected.gradients and len(expected.gradients) < len(expected.parameters)
    assert_same(found, expected)


def test_a_stage_that_trains_nothing_is_passed_through(group: Groups) -> None:
    adapter = AdapterConfig(rank=2, target_modules=["decoder.layers.*.fc1"])
    found = group(2).run(in_layout, "marian", Layout(pipeline=2), P(split=(2, 2)), 3, {"adapter": adapter})[0]
    assert_same(found, one_process("marian", adapter=adapter))


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"data_parallel_shard_degree": 2},
    "tp2": {"tensor_parallel_degree": 2},
    "pp2": {"pipeline_parallel_degree": 2},
}


def adapted(layout: int | dict[str, Any], **keys: Any) -> RunConfig:
    config = make_config(layout=layout, **keys)
    adapter = AdapterConfig(rank=2, alpha=6.0, target_modules=["fc1", "out_proj"])
    return config.model_copy(update={"model": config.model.model_copy(update={"adapter": adapter})})


@pytest.mark.parametrize(
    "first, second",
    [("fsdp2", "pp2"), pytest.param("tp2", "fsdp2", marks=pytest.mark.slow), ("pp2", "tp2")],
)
def test_a_merged_version_holds_its_base_and_its_adapter_added_and_goes_on_in_another_layout(
    group: Groups, tmp_path: Path, first: str, second: str
) -> None:
    keys = {"max_steps": 4, "save_steps": 2}
    one = group(1).run(train, Job(adapted(1, **keys), str(tmp_path / "one")))[0]
    folder = str(tmp_path / "cut")
    cut = group(2).run(train, Job(adapted(LAYOUTS[first], **keys), folder))[0]
    assert cut.losses == pytest.approx(one.losses, abs=1e-6)
    assert [result.error for _, result in cut.saved] == [None, None]
    job = Job(adapted(LAYOUTS[second], **keys), folder, resume_step=2)
    resumed = group(2).run(train, job)[0]
    assert resumed.losses == pytest.approx({step: one.losses[step] for step in (3, 4)}, abs=1e-6)

    tensors = checkpoint_tensors(folder, 2)
    assert {name.split(".")[0] for name in tensors} == {"model", "adapter", "optim"}
    assert all(".lora_" in name for name in tensors if name.startswith("optim."))
    processor = load_task(make_config()).build_processor(examples_of("translation", 200))
    base = dict(build_model(make_config(), processor, "cpu").named_parameters())
    prefixes = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    adapted_names = {name.removeprefix("adapter.") for name in prefixes if name.startswith("adapter.")}
    assert adapted_names
    for name in adapted_names:
        a, b = (tensors[f"adapter.{name}.lora_{factor}.weight"] for factor in "AB")
        assert b.abs().max() > 0
        assert torch.equal(tensors[f"model.{name}.weight"], base[f"{name}.weight"] + 3.0 * (b @ a))
    untouched = base.keys() - {f"{name}.weight" for name in adapted_names}
    assert all(torch.equal(tensors[f"model.{name}"], base[name]) for name in untouched)
