"""A swapped version frees what it held."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref

import torch
from fake_checkpoint import tiny_checkpoint

from eagleray.config.schema import ServeConfig
from eagleray.engine import load_engine
from eagleray.engine.worker import ModelThread
from eagleray_serving.answering import Asking
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.split import Split
from eagleray_serving.versions import Versions


def test_a_version_that_was_swapped_leaves_neither_weights_nor_threads() -> None:
    def load(seed: int) -> BatchedEngine:
        checkpoint, _ = tiny_checkpoint()
        checkpoint.version = f"v{seed}"
        checkpoint.ref = f"tiny@v{seed}"
        return BatchedEngine(load_engine(checkpoint), ServeConfig())

    async def swap() -> None:
        before = set(threading.enumerate())
        old = load(1)
        weights = [weakref.ref(each) for each in old._engine.model.parameters()]
        assert len(weights) > 10
        versions = Versions(old)
        del old
        await asyncio.gather(*(versions.answer([{"source": "one hour"}], {}, Asking(c)) for c in "abc"))
        threads = {each for each in threading.enumerate() if each.name.startswith("eagleray-")} - before
        assert len(threads) == 2
        versions.add(load(2))
        versions.route(Split("v2"))
        await versions.retire("v1")
        assert [each for each in weights if each() is not None] == []
        assert threads & set(threading.enumerate()) == set()
        assert (await versions.answer([{"source": "one hour"}], {}, Asking("d"))).version == "v2"
        await versions.get("v2").close()

    torch.set_num_threads(1)
    asyncio.run(asyncio.wait_for(swap(), 60))


def test_a_model_thread_that_nobody_holds_ends() -> None:
    async def call() -> threading.Thread:
        return await ModelThread().call(threading.current_thread)

    thread = asyncio.run(call())
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()
