"""Sharding and tensor parallelism give the initial weights, gradients, losses and weights of one process."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch.distributed as dist
from ranks import RankGroup
from runs import assert_same, in_layout, one_process

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel import ParallelOptions, build_mesh

Groups = Callable[[int], RankGroup]

LAYOUTS = [
    Layout(replicate=2),
    Layout(shard=2),
    Layout(tensor=2),
    Layout(shard=3),
    Layout(replicate=2, shard=2),
    Layout(shard=2, tensor=2),
    Layout(replicate=2, tensor=2),
    Layout(tensor=4),
    Layout(shard=4),
]
OPTIONS = {
    "plain": ParallelOptions(),
    "sequence": ParallelOptions(sequence_parallel=True),
    "recompute": ParallelOptions(activation_checkpointing="full", reshard_after_forward=False),
    "selective": ParallelOptions(activation_checkpointing="selective"),
    "both": ParallelOptions(sequence_parallel=True, activation_checkpointing="selective"),
}
SAMPLE = {
    ("marian", "fsdp2", "plain"),
    ("marian", "tp2", "both"),
    ("bert", "fsdp2", "selective"),
    ("bert", "tp2", "plain"),
    ("vit", "tp2", "sequence"),
    ("vit", "fsdp2", "recompute"),
    ("marian", "fsdp2.tp2", "sequence"),
    ("bert", "hsdp2x2", "plain"),
    ("vit", "ddp2.tp2", "plain"),
    ("own", "fsdp2.tp2", "both"),
    ("t5", "fsdp2", "recompute"),
    ("t5", "tp2", "both"),
    ("distilbert", "fsdp2", "plain"),
    ("distilbert", "tp2", "both"),
    ("qwen3", "tp2", "recompute"),
}
FAMILIES = ("marian", "t5", "bert", "distilbert", "vit", "own")
CASES = [
    (family, layout, options)
    for family, layout, options in product(FAMILIES, LAYOUTS, OPTIONS)
    if layout.tensor > 1 or not OPTIONS[options].sequence_parallel
]
# Its plan is the one that its config carries: two heads of keys, and a stream that is not cut along the sequence.
CASES += [
    ("qwen3", layout, options)
    for layout, options in product(LAYOUTS, OPTIONS)
    if layout.tensor <= 2 and not OPTIONS[options].sequence_parallel
]


def test_the_matrix_covers_what_it_says() -> None:
    assert len(CASES) == 6 * (5 * 3 + 4 * 5) + 8 * 3
    assert {(family, str(layout), options) for family, layout, options in CASES} >= SAMPLE


@pytest.mark.parametrize(
    "family, layout, options",
    [
        pytest.param(*case, id="-".join(map(str, case)), marks=() if key in SAMPLE else pytest.mark.slow)
        for case in CASES
        for key in [(case[0], str(case[1]), case[2])]
    ],
)
def test_a_layout_gives_what_one_process_gives(group: Groups, family: str, layout: Layout, options: str) -> None:
    found = group(layout.num_workers).run(in_layout, family, layout, OPTIONS[options])[0]
    assert_same(found, one_process(family))


@pytest.mark.parametrize(
    "family, changes",
    [
        ("marian", {"vocab_size": 37}),
        ("marian", {"tie_word_embeddings": False}),
        ("t5", {"vocab_size": 37, "feed_forward_proj": "gated-gelu", "num_decoder_layers": 1}),
    ],
    ids=str,
)
def test_a_vocabulary_that_does_not_divide_and_untied_embeddings_are_right(
    group: Groups, family: str, changes: dict[str, Any]
) -> None:
    found = group(2).run(in_layout, family, Layout(tensor=2), ParallelOptions(), 3, changes)[0]
    assert_same(found, one_process(family, **changes))


def test_heads_that_the_degree_does_not_divide_are_refused_with_the_numbers(group: Groups) -> None:
    message = group(3).run(refused, "bert", Layout(tensor=3))[0]
    assert "parallel.tensor_parallel_degree 3 does not divide num_attention_heads 4" in message
    assert "degrees that fit: 1, 2, 4" in message


def test_a_plan_of_the_config_is_refused_where_it_does_not_fit(group: Groups) -> None:
    message = group(4).run(refused, "qwen3", Layout(tensor=4))[0]
    assert "parallel.tensor_parallel_degree 4 does not divide num_key_value_heads 2" in message
    message = group(2).run(refused, "qwen3", Layout(pipeline=2))[0]
    assert "Qwen3ForSequenceClassification does not say how it can be cut into stages" in message


def test_ranks_of_one_tensor_parallel_group_are_neighbours_and_so_on_one_node(group: Groups) -> None:
    assert group(4).run(tensor_parallel_group, Layout(shard=2, tensor=2)) == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert group(4).run(tensor_parallel_group, Layout(pipeline=2, tensor=2)) == [[0, 1], [0, 1], [2, 3], [2, 3]]


def tensor_parallel_group(layout: Layout) -> list[int]:
    return dist.get_process_group_ranks(build_mesh(layout, "cpu", timeout_s=15).get_group("tp"))


def refused(family: str, layout: Layout) -> str:
    with pytest.raises(ConfigError) as error:
        in_layout(family, layout, ParallelOptions())
    return str(error.value)
