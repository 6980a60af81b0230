"""Answers of a loaded model as they grow."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest
from fake_checkpoint import tiny_checkpoint
from tiny_models import PAIRS

from eagleray.config.schema import ServeConfig
from eagleray.engine import load_engine
from eagleray_serving.answering import Answered, Asking, ItemFailure
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.versions import Versions


def held_engine(backend: Literal["auto", "torch"] = "auto") -> tuple[Versions, Any]:
    engine = load_engine(tiny_checkpoint()[0], serve=ServeConfig(engine=backend))
    return Versions(BatchedEngine(engine, ServeConfig())), engine


# Where CTranslate2 is installed, `auto` answers with it, and lets our own decoder show how an answer grows.
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_real_model_grows_to_what_it_answers_at_once(backend: Literal["auto", "torch"]) -> None:
    options, asking = {"max_new_tokens": 8}, Asking("one")
    versions, engine = held_engine(backend)

    async def go(item: Mapping[str, Any]) -> tuple[list[Answered], Sequence[Answered]]:
        grown = [answers async for answers in versions.stream(item, options, asking)]
        assert [answers.is_whole for answers in grown] == [False] * (len(grown) - 1) + [True]
        return [answers.items[0] for answers in grown], (await versions.answer([item], options, asking)).items

    async def main() -> None:
        *partial, last = (await go({"source": PAIRS[0]["source"]}))[0]
        assert [last] == engine.answer([{"source": PAIRS[0]["source"]}], options)
        assert len(partial) > 1 and all(last["text"].startswith(each["text"]) for each in partial)  # type: ignore[index,call-overload]
        (failed,), whole = await go({"source": ""})
        assert isinstance(failed, ItemFailure) and [failed] == list(whole)
        await versions.get(versions.loaded[0]).close()

    asyncio.run(main())


def test_a_client_that_goes_leaves_the_batch() -> None:
    versions, _ = held_engine()
    batched = versions.get(versions.loaded[0])

    async def main() -> None:
        stream = versions.stream({"source": PAIRS[0]["source"]}, {}, Asking("one"))
        await anext(stream)
        await stream.aclose()
        async with asyncio.timeout(5):
            while batched._batcher._running:  # type: ignore[attr-defined]
                await asyncio.sleep(0.01)
        await batched.close()

    asyncio.run(main())
