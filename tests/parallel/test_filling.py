"""No rank ever holds the whole model, and its part is that of one process, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build_whole
from filling import Filled, fill_family, fill_file, gather_for_evaluation, read_from_source, save_bert
from ranks import RankGroup
from training import make_config, processor_of

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.models import build_model

Groups = Callable[[int], RankGroup]
DEEP: dict[str, dict[str, Any]] = {
    "marian": {"d_model": 64, "encoder_layers": 8, "decoder_layers": 8},
    "bert": {"hidden_size": 64, "num_hidden_layers": 16, "intermediate_size": 96},
    "own": {"width": 64, "depth": 32},
}
LAYOUTS = [
    Layout(shard=4),
    Layout(replicate=2, shard=2),
    Layout(tensor=2),
    Layout(shard=2, tensor=2),
    Layout(pipeline=2),
    Layout(pipeline=2, tensor=2),
    Layout(pipeline=2, shard=2),
]
SAMPLE = {("marian", "fsdp4"), ("bert", "fsdp2.tp2"), ("own", "tp2"), ("marian", "pp2.tp2"), ("bert", "pp2.fsdp2")}
CASES = [(family, layout) for family in DEEP for layout in LAYOUTS]


def test_the_sample_is_part_of_the_matrix() -> None:
    assert {(family, str(layout)) for family, layout in CASES} >= SAMPLE


@pytest.mark.parametrize(
    "family, layout",
    [
        pytest.param(*case, id=f"{case[0]}-{case[1]}", marks=() if key in SAMPLE else pytest.mark.slow)
        for case in CASES
        for key in [(case[0], str(case[1]))]
    ],
)
def test_a_rank_holds_its_share_and_never_more_than_a_module_besides(
    group: Groups, family: str, layout: Layout
) -> None:
    expected = dict(build_whole(family, **DEEP[family]).named_parameters())
    whole_bytes = sum(parameter.nbytes for parameter in expected.values())
    largest = max(parameter.nbytes for parameter in expected.values())
    share = whole_bytes / (layout.shard * layout.tensor * layout.pipeline)
    for rank in group(layout.num_workers).run(fill_family, family, layout, DEEP[family]):
        assert rank.held < 1.25 * share
        assert rank.peak < rank.held + 3 * largest < 0.8 * whole_bytes
        for name, value in rank.weights.items():
            assert torch.equal(value, expected[name]), name


def test_a_stored_model_is_read_in_parts(group: Groups) -> None:
    for num_bytes, held in group(4).run(read_from_source, "bert", Layout(shard=4), DEEP["bert"]):
        assert num_bytes <= held


@pytest.mark.parametrize("layout", [Layout(shard=2), Layout(tensor=2), Layout(pipeline=2)], ids=str)
@pytest.mark.parametrize("stored", ["classifier", "other labels", "base", "half"])
def test_a_pretrained_checkpoint_gives_each_rank_its_part_of_what_transformers_loads(
    group: Groups, tmp_path: Path, layout: Layout, stored: str
) -> None:
    labels = len(processor_of("text-classification").labels)
    save_bert(
        tmp_path,
        3 if stored == "other labels" else labels,
        torch.bfloat16 if stored == "half" else torch.float32,
        base=stored == "base",
    )
    config = pretrained(tmp_path)
    one = dict(build_model(config, processor_of("text-classification"), "cpu").named_parameters())
    ranks: list[Filled] = group(2).run(fill_file, config, layout)
    found = ranks[0].weights | ranks[1].weights
    assert found.keys() == one.keys()
    assert [name for name in one if not torch.equal(found[name], one[name])] == []
    theirs = dict(whole_bert(tmp_path).named_parameters())
    kept = [name for name in theirs if stored == "classifier" or not name.startswith("classifier")]
    assert [name for name in kept if not torch.equal(found[name], theirs[name])] == []


def pretrained(directory: Path) -> RunConfig:
    config = make_config("text-classification")
    return RunConfig.model_validate(config.model_dump() | {"model": {"pretrained": str(directory)}})


def whole_bert(directory: Path) -> torch.nn.Module:
    import transformers

    model: torch.nn.Module = transformers.BertForSequenceClassification.from_pretrained(
        directory, dtype=torch.float32
    )
    return model


@pytest.mark.parametrize("family, layout", [("marian", Layout(pipeline=2)), ("bert", Layout(pipeline=2, shard=2))])
def test_a_pipeline_has_the_whole_model_only_while_it_is_evaluated(
    group: Groups, family: str, layout: Layout
) -> None:
    for same, whole_bytes, held in group(layout.num_workers).run(gather_for_evaluation, family, layout):
        assert same
        assert held < 0.75 * whole_bytes
