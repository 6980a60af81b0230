"""Pipelines give the initial weights, gradients, losses and weights of one process, wherever they are cut."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from ranks import RankGroup
from runs import assert_same, in_layout, one_process

from eagleray.config.layout import Layout
from eagleray.errors import ConfigError
from eagleray.parallel import ParallelOptions

Groups = Callable[[int], RankGroup]
P = ParallelOptions

CASES = {
    "marian-pp2": ("marian", Layout(pipeline=2), P()),
    "marian-pp2-interleaved": ("marian", Layout(pipeline=2), P(schedule="Interleaved1F1B")),
    "marian-pp2-split": ("marian", Layout(pipeline=2), P(split=(1, 3), activation_checkpointing="full")),
    "bert-pp2-zbv": ("bert", Layout(pipeline=2), P(schedule="ZBVZeroBubble")),
    "vit-pp2-gpipe": ("vit", Layout(pipeline=2), P(schedule="GPipe", num_microbatches=2)),
    "t5-pp2": ("t5", Layout(pipeline=2), P()),
    "t5-pp2.fsdp2": ("t5", Layout(pipeline=2, shard=2), P(split=(1, 3))),
    "distilbert-pp2": ("distilbert", Layout(pipeline=2), P()),
    "marian-pp2.fsdp2": ("marian", Layout(pipeline=2, shard=2), P()),
    "marian-pp2.tp2": ("marian", Layout(pipeline=2, tensor=2), P(sequence_parallel=True)),
    "own-pp2-zero": ("own", Layout(pipeline=2), P(schedule="InterleavedZeroBubble")),
    "own-pp2.tp2": ("own", Layout(pipeline=2, tensor=2), P(sequence_parallel=True)),
    "vit-pp2.ddp2": ("vit", Layout(pipeline=2, replicate=2), P()),
}
SLOW = {
    "bert-pp2-gpipe": ("bert", Layout(pipeline=2), P(schedule="GPipe")),
    "t5-pp2-late": ("t5", Layout(pipeline=2), P(split=(3, 1), activation_checkpointing="full")),
    "t5-pp2-interleaved": ("t5", Layout(pipeline=2), P(schedule="Interleaved1F1B")),
    "t5-pp2.tp2": ("t5", Layout(pipeline=2, tensor=2), P(split=(1, 3), sequence_parallel=True)),
    "t5-pp4": ("t5", Layout(pipeline=4), P(num_microbatches=8)),
    "distilbert-pp2.tp2": ("distilbert", Layout(pipeline=2, tensor=2), P(sequence_parallel=True)),
    "distilbert-pp2.fsdp2": ("distilbert", Layout(pipeline=2, shard=2), P(schedule="Interleaved1F1B")),
    "distilbert-pp2-zbv": ("distilbert", Layout(pipeline=2), P(schedule="ZBVZeroBubble")),
    "bert-pp2-interleaved": ("bert", Layout(pipeline=2), P(schedule="Interleaved1F1B")),
    "bert-pp2-zero": ("bert", Layout(pipeline=2), P(schedule="InterleavedZeroBubble")),
    "marian-pp2-late": ("marian", Layout(pipeline=2), P(split=(3, 1))),
    "marian-pp4": ("marian", Layout(pipeline=4), P(num_microbatches=8)),
    "bert-pp2.fsdp2-interleaved": ("bert", Layout(pipeline=2, shard=2), P(schedule="Interleaved1F1B")),
    "bert-pp2.tp2-zbv": ("bert", Layout(pipeline=2, tensor=2), P(schedule="ZBVZeroBubble")),
    "vit-pp2.tp2-zero": ("vit", Layout(pipeline=2, tensor=2), P(schedule="InterleavedZeroBubble")),
    "marian-pp2.tp2-interleaved": ("marian", Layout(pipeline=2, tensor=2), P(schedule="Interleaved1F1B")),
}


@pytest.mark.parametrize("case", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_pipeline_gives_what_one_process_gives(group: Groups, case: str) -> None:
    family, layout, options = (CASES | SLOW)[case]
    found = group(layout.num_workers).run(in_layout, family, layout, options, timeout_s=240.0)[0]
    assert_same(found, one_process(family))


@pytest.mark.parametrize(
    "family, layout, options, message",
    [
        ("bert", Layout(pipeline=2, shard=2), P(schedule="ZBVZeroBubble"), "FSDP loses gradients"),
        ("marian", Layout(pipeline=2, shard=2), P(schedule="Interleaved1F1B"), "tied, into two stages of rank 0"),
        ("marian", Layout(pipeline=2), P(schedule="ZBVZeroBubble"), "cannot run MarianMTModel"),
        ("bert", Layout(pipeline=2), P(split=(1, 2)), "parallel.pipeline_parallel_split is [1, 2]"),
        (
            "bert",
            Layout(pipeline=2),
            P(num_microbatches=3),
            "8 rows of the global batch",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_with_the_numbers(
    group: Groups, family: str, layout: Layout, options: ParallelOptions, message: str
) -> None:
    assert message in group(layout.num_workers).run(refusal, family, layout, options)[0]


def refusal(family: str, layout: Layout, options: ParallelOptions) -> str:
    with pytest.raises(ConfigError) as error:
        in_layout(family, layout, options)
    return str(error.value)
