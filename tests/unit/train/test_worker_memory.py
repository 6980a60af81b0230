"""Workers without enough memory: how it is noticed, and what the user is told."""

from __future__ import annotations

import gc
import pickle
import subprocess
import sys
import time
import weakref
from typing import Any

import pytest
import torch
from transformers import MarianConfig, MarianMTModel

from eagleray.config.layout import parse_layout
from eagleray.config.schema import RunConfig
from eagleray.errors import WorkerError, WorkerMemoryError
from eagleray_jobs.train.failures import RankFailure, find_fatal, merge
from eagleray_jobs.train.memory import (
    POLL_S,
    MemoryGuard,
    as_memory_error,
    ended_for_memory,
    over_limit,
    own_memory_bytes,
    show_bytes,
    spare_the_collector,
)
from eagleray_jobs.train.needs import Needs, find_needs

HOLDS_TOO_MUCH = """
import os, sys, time
import numpy as np
from eagleray_jobs.train.memory import MemoryGuard, own_memory_bytes

def exceeded(held):
    print(held, flush=True)
    os._exit(7)

limit = own_memory_bytes() + 100_000_000
with MemoryGuard(limit, exceeded):
    reserved = np.empty(10_000_000_000, np.uint8)  # address space; nothing of it is resident
    time.sleep(0.5)
    print("alive", limit, flush=True)
    held = np.ones(400_000_000, np.uint8)
    time.sleep(30)
"""


def test_a_process_that_holds_more_than_its_limit_is_ended_and_address_space_does_not_count() -> None:
    done = subprocess.run([sys.executable, "-c", HOLDS_TOO_MUCH], capture_output=True, text=True, timeout=60)
    alive, held = done.stdout.splitlines()
    assert done.returncode == 7 and int(held) > int(alive.split()[1])


def test_there_is_room_for_what_fits_beside_the_most_that_was_held() -> None:
    def unexpected(held: int) -> None:
        raise AssertionError(held)

    with MemoryGuard(None, unexpected) as without_limit:
        assert without_limit.has_room(10**15)
    with MemoryGuard(own_memory_bytes() + 1_000_000_000, unexpected) as guard:
        assert guard.has_room(600_000_000) and not guard.has_room(1_000_000_000)
        held = torch.ones(100_000_000)
        time.sleep(10 * POLL_S)
        del held
        assert guard.has_room(300_000_000) and not guard.has_room(600_000_000)


KEEPS_FREED_MEMORY = """
import os, sys, time
import numpy as np
from eagleray_jobs.train.memory import MemoryGuard, own_memory_bytes

before = own_memory_bytes()
blocks = [np.ones(60_000, np.uint8) for _ in range(5_000)]  # too small to be mapped one by one
last = np.ones(60_000, np.uint8)
del blocks
kept = own_memory_bytes() - before
with MemoryGuard(before + 100_000_000, lambda held: os._exit(7)):
    time.sleep(0.5)
print(kept, own_memory_bytes() - before)
"""


def test_memory_that_only_the_allocator_keeps_is_given_back_first() -> None:
    done = subprocess.run([sys.executable, "-c", KEEPS_FREED_MEMORY], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    kept, left = map(int, done.stdout.split())
    assert kept > 200_000_000 and left < 100_000_000


def test_memory_of_ones_own_grows_with_what_is_written() -> None:
    before = own_memory_bytes()
    written = torch.ones(25_000_000)
    assert own_memory_bytes() - before > 0.9 * written.nbytes


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."),
    ],
)
def test_what_allocators_raise_becomes_an_error_of_ours(error: BaseException) -> None:
    found = as_memory_error(3, error)
    assert found is not None and found.message.startswith("rank 3 ran out of memory: ")
    assert found.__cause__ is error and "\n" not in found.message


def test_torch_says_so_when_the_host_has_no_more() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert as_memory_error(0, caught.value) is not None
    assert as_memory_error(0, RuntimeError("a column is missing")) is None


def test_ranks_that_ran_out_one_after_the_other_are_one_error_and_fatal() -> None:
    failures = [RankFailure.of(rank, over_limit(rank, 3_000_000 + rank, 2_000_000)) for rank in (0, 1)]
    assert find_fatal(failures)
    error = merge(failures)
    assert isinstance(error, WorkerMemoryError) and pickle.loads(pickle.dumps(error)).message == error.message
    assert error.message == (
        "rank 0 held 3 MB of memory of its own; resources.worker_memory_limit_bytes is 2000000 (2 MB)"
    )
    other = RankFailure.of(2, ValueError("a column is missing"))
    assert type(merge([*failures, other])) is WorkerError


def test_who_ended_a_worker_is_told_only_where_it_is_known() -> None:
    # What Ray says of every worker that died, whatever it died of.
    any_death = "The process is killed by SIGKILL by OOM killer due to high memory usage. (2) ray stop is called."
    assert ended_for_memory([any_death], num_kills=0) is None
    assert ended_for_memory([any_death], num_kills=1) == "the out-of-memory killer of this machine was at work"
    monitor = "ActorDiedError: x\n  Task was killed due to the node running low on memory.\nMemory on the node ..."
    assert ended_for_memory([any_death, monitor], 0) == "Task was killed due to the node running low on memory."


def file(layout: str = "ddp2", **parallel: Any) -> RunConfig:
    degrees = parse_layout(layout)
    return RunConfig.model_validate(
        {
            "name": "tiny",
            "task": "translation",
            "model": {"family": "marian"},
            "data": {"train": "unused.jsonl"},
            "train": {"max_steps": 1, "global_batch_size": 8, "per_device_train_batch_size": 4},
            "parallel": {
                "data_parallel_replicate_degree": degrees.replicate,
                "data_parallel_shard_degree": degrees.shard,
                "tensor_parallel_degree": degrees.tensor,
                **parallel,
            },
        }
    )


def needs(layout: str = "ddp2", **parallel: Any) -> Needs:
    with torch.device("meta"):
        model = MarianMTModel(
            MarianConfig(
                vocab_size=60, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64,
                pad_token_id=59,
            )
        )  # fmt: skip
    return find_needs(model, file(layout, **parallel), parse_layout(layout))


def test_the_hint_names_four_remedies_with_their_keys_and_what_each_would_need() -> None:
    found = needs()
    whole = found.footprint.total
    shard, tensor, pipeline, activations = found.remedies
    assert shard.settings == "parallel.data_parallel_replicate_degree=1 parallel.data_parallel_shard_degree=2"
    assert tensor.settings.endswith(" parallel.tensor_parallel_degree=2")
    assert pipeline.settings.endswith(" parallel.pipeline_parallel_degree=2")
    assert activations.settings == (
        "parallel.activation_checkpointing=full or a smaller train.per_device_train_batch_size (now 4)"
    )
    for remedy in (shard, tensor, pipeline):
        assert remedy.num_bytes is not None and 0.45 * whole < remedy.num_bytes < 0.75 * whole
        assert f"{remedy.settings}: about {show_bytes(remedy.num_bytes)} per worker" in found.hint()
    assert found.hint().startswith(
        f"weights, gradients and optimizer state are about {show_bytes(whole)} per worker"
    )


def test_without_replicas_a_degree_is_doubled_and_what_cannot_be_is_named() -> None:
    shard, tensor, pipeline, _ = needs("tp4").remedies
    assert shard.settings == "parallel.data_parallel_shard_degree=2"
    assert tensor.settings == "parallel.tensor_parallel_degree=8"
    assert str(tensor).startswith("parallel.tensor_parallel_degree=8: not possible, ")
    assert "encoder_attention_heads 4" in str(tensor)
    assert pipeline.num_bytes is not None


def test_a_limit_below_the_estimate_is_warned_of() -> None:
    found = needs()
    assert found.warning(None, "key") is None and found.warning(2.0 * found.footprint.total, "key") is None
    assert str(found.warning(1000.0, "resources.worker_memory_limit_bytes")).startswith(
        "resources.worker_memory_limit_bytes is 1000 (1 kB), and weights, gradients and optimizer state alone"
    )


def test_recomputing_activations_is_not_advised_where_it_is_done() -> None:
    assert "activation_checkpointing" not in needs(activation_checkpointing="full").hint()


@pytest.mark.parametrize(
    "number, text", [(999, "999 bytes"), (1_234_000, "1.23 MB"), (64e9, "64 GB"), (3e15, "3e+03 TB")]
)
def test_bytes_are_spelled_with_three_digits(number: float, text: str) -> None:
    assert show_bytes(number) == text


TAKES_AND_FREES = """
import torch
from eagleray_jobs.train.memory import keep_heap_small, own_memory_bytes

torch.empty(8_000_000)  # from here on the allocator keeps such blocks
keep_heap_small("cpu", 16_000_000)
before, kept = own_memory_bytes(), []
for _ in range(20):  # as FSDP does with the weights of a layer, beside activations
    block = torch.ones(4_000_000)
    kept.append(torch.ones(10_000))
    del block
print(own_memory_bytes() - before)
"""


def test_blocks_of_a_layer_that_are_taken_and_freed_do_not_grow_the_heap() -> None:
    done = subprocess.run([sys.executable, "-c", TAKES_AND_FREES], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 40_000_000  # without it 304 MB on glibc 2.36


def test_what_exists_is_not_looked_through_again() -> None:
    class Node:
        itself: object = None

    old = Node()
    old.itself = old
    spare_the_collector()
    try:
        watched = gc.get_objects()
        new = Node()
        new.itself = new
        assert not any(each is old for each in watched)
        assert any(each is new for each in gc.get_objects())
        gone = weakref.ref(new)
        del new, watched
        gc.collect()
        assert gone() is None  # what comes later is collected as ever
    finally:
        gc.unfreeze()
