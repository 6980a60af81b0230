"""A loaded version answers items, each for itself."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from fake_checkpoint import FakeCheckpoint, tiny_checkpoint
from tiny_models import PAIRS, ROWS, tiny_config, tiny_parts

from eagleray.engine import (
    Batcher,
    BatchLimits,
    Engine,
    ItemError,
    ModelThread,
    Prepared,
    in_batches,
    load_engine,
)
from eagleray.engine.plan import cut_batches
from eagleray.errors import CheckpointDamagedError
from eagleray.tasks import Answer, Batch, Encoded, Example, Processor
from eagleray.tasks.translation import TranslationTask

LIMITS = BatchLimits(max_items=4, max_tokens=96)
SHORT = {"max_new_tokens": 6}


class EchoTask(TranslationTask):
    """Answers with the source itself, upper case; fails on what holds `poison`; records its batches."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.batches: list[list[str]] = []

    def predict(
        self, model: torch.nn.Module, batch: Batch, processor: Processor, options: Mapping[str, Any]
    ) -> list[Answer]:
        texts = processor.tokenizer.batch_decode(batch["input_ids"], skip_special_tokens=True)  # type: ignore[attr-defined]
        self.batches.append(texts)
        if any("poison" in text for text in texts):
            raise ValueError("poisoned")
        return [{"text": text.upper()} for text in texts]


def echo_engine(limits: BatchLimits = LIMITS) -> tuple[Engine, EchoTask]:
    config = tiny_config()
    _, processor, model = tiny_parts(config)
    task = EchoTask(config)
    return Engine(model, task, processor, ref="echo@r1-step-00000001", limits=limits), task


def texts(answers: Sequence[Answer | ItemError]) -> list[str]:
    return [answer["text"] if not isinstance(answer, ItemError) else answer.code for answer in answers]


@pytest.mark.parametrize("task", ROWS)
def test_a_loaded_engine_gives_what_the_trained_model_gave(task: str) -> None:
    checkpoint, model = tiny_checkpoint(task)
    engine = load_engine(checkpoint)
    assert not engine.model.training
    rows = [engine.task.encode(row, engine.processor).features for row in ROWS[task]]
    batch = engine.task.collate(rows, engine.processor)
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        assert torch.equal(engine.model(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("task", ROWS)
def test_items_together_are_answered_as_alone(task: str) -> None:
    engine = load_engine(tiny_checkpoint(task)[0], limits=LIMITS)
    items = [{column: row[column] for column in engine.task.input_columns} for row in ROWS[task]]
    together = engine.answer(items * 2, SHORT)
    alone = [engine.answer([item], SHORT)[0] for item in items]
    for one, other in zip(together, alone * 2, strict=True):
        assert not isinstance(one, ItemError) and not isinstance(other, ItemError)
        if engine.task.route == "translate":
            assert one == other
        else:
            assert one["label"] == other["label"]
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)


CLASSIFIERS = {
    "bert": {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 32, "intermediate_size": 64,
             "max_position_embeddings": 512},
    "distilbert": {"n_layers": 2, "n_heads": 2, "dim": 32, "hidden_dim": 64, "max_position_embeddings": 512},
}  # fmt: skip


@pytest.mark.parametrize("family", CLASSIFIERS)
def test_scores_of_texts_of_all_lengths_are_those_of_each_alone(family: str) -> None:
    model = {"family": family, "config": CLASSIFIERS[family], "tokenizer": {"vocab_size": 280}}
    data = {"train": "rows.jsonl", "max_source_length": 450}
    engine = load_engine(tiny_checkpoint("text-classification", model=model, data=data)[0])
    draw = random.Random(7)
    items = [
        {"text": "".join(draw.choice("aeiou rstlnd,.") for _ in range(draw.randint(1, 400))) + "!"}
        for _ in range(300)
    ]
    alone = [engine.answer([item])[0] for item in items]

    async def batched() -> list[Any]:
        running = ModelThread()
        batcher = Batcher[Prepared, Any](running.start(engine), engine.limits)
        prepared = [engine.prepare(item) for item in items]
        assert all(isinstance(item, Prepared) for item in prepared)
        answers = await asyncio.gather(
            *(batcher.submit(item, num_tokens=item.num_tokens) for item in prepared if isinstance(item, Prepared))
        )
        await batcher.close()
        running.close()
        return answers

    lengths = [item.num_tokens for item in map(engine.prepare, items) if isinstance(item, Prepared)]
    assert min(lengths) < 10 and max(lengths) > 350
    for together in (engine.answer(items), asyncio.run(batched())):
        for one, other in zip(together, alone, strict=True):
            assert not isinstance(one, ItemError) and not isinstance(other, ItemError)
            assert one["label"] == other["label"]
            assert one["scores"] == pytest.approx(other["scores"], abs=1e-6)


def test_answers_keep_the_order_and_batches_are_sorted_by_length_and_bounded() -> None:
    engine, task = echo_engine()
    items = [{"source": "x" * (1 + (7 * i) % 20)} for i in range(30)]
    assert texts(engine.answer(items)) == [item["source"].upper() for item in items]
    lengths = [[len(text) for text in batch] for batch in task.batches]
    assert max(len(batch) for batch in lengths) == LIMITS.max_items
    flat = [length for batch in lengths for length in batch]
    assert flat == sorted(flat, reverse=True)


def test_an_item_that_makes_the_model_fail_fails_alone() -> None:
    engine, _ = echo_engine(BatchLimits(8, 8192))
    answers = engine.answer([{"source": f"text {i}" if i not in (2, 5) else "poison"} for i in range(8)])
    assert texts(answers) == [f"TEXT {i}" if i not in (2, 5) else "model_failed" for i in range(8)]
    failed = answers[2]
    assert isinstance(failed, ItemError) and failed.message == "the model failed on this item (ValueError)"
    assert str(failed) == "the model failed on this item (ValueError): poisoned"


class FragileTask(EchoTask):
    """Raises what a user's task may raise, in every method that sees a single item."""

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        if example["source"] == "odd":
            raise KeyError("surprise")
        return super().encode(example, processor, answer=answer)

    def join(self, example: Example, parts: Sequence[Example], answers: Sequence[Answer]) -> Answer:
        raise ZeroDivisionError("nobody can join")


def test_whatever_a_task_raises_on_an_item_concerns_that_item_alone() -> None:
    config = tiny_config()
    _, processor, model = tiny_parts(config)
    engine = Engine(model, FragileTask(config), processor, ref="echo@r1-step-00000001", limits=LIMITS)
    long = "One sentence is here. " * 4
    answers = engine.answer([{"source": text} for text in ("a", "odd", long, "b")])
    assert texts(answers) == ["A", "invalid_item", "model_failed", "B"]
    odd, joined = answers[1], answers[2]
    assert isinstance(odd, ItemError) and str(odd) == "the task cannot use this item (KeyError): 'surprise'"
    assert isinstance(joined, ItemError) and str(joined).endswith("joined (ZeroDivisionError): nobody can join")
    assert not any(said in error.message for error in (odd, joined) for said in ("surprise", "nobody"))


def test_an_item_that_cannot_be_used_fails_alone() -> None:
    engine, _ = echo_engine()
    items: list[Example] = [{"source": "good"}, {"source": 3}, {"text": "x"}, {"source": " "}, {"source": "too"}]
    assert texts(engine.answer(items)) == ["GOOD", "invalid_item", "invalid_item", "invalid_item", "TOO"]


def test_a_long_text_is_split_at_sentences_and_joined_with_its_own_white_space() -> None:
    engine, _ = echo_engine()
    text = "one hour is long.  two hours more.\n\nthree! four? " + "and so on. " * 9 + "end"
    prepared = engine.prepare({"source": text})
    assert isinstance(prepared, Prepared) and len(prepared.parts) > 3
    assert max(prepared.lengths) <= 32 and prepared.num_tokens == sum(prepared.lengths)
    assert texts(engine.answer([{"source": "a"}, {"source": text}, {"source": "b"}])) == ["A", text.upper(), "B"]


def test_a_sentence_that_is_too_long_is_refused_with_the_limit() -> None:
    engine, _ = echo_engine()
    answers = engine.answer([{"source": "Short. " + "word, " * 40}, {"source": "x"}])
    assert answers[0] == ItemError(
        "too_long", "a sentence is longer than the limit of 32 tokens", "split it into shorter ones"
    )
    assert texts(answers)[1] == "X"


def test_a_text_to_classify_that_is_too_long_is_refused_with_the_limit() -> None:
    engine = load_engine(tiny_checkpoint("text-classification")[0])
    answer = engine.answer([{"text": "word " * 40}])[0]
    assert isinstance(answer, ItemError)
    assert (answer.code, answer.message) == ("too_long", "the item is longer than the limit of 32 tokens")


def test_the_summary_says_what_a_server_needs() -> None:
    summary = load_engine(tiny_checkpoint()[0]).summary
    assert (summary.ref, summary.name, summary.version) == ("tiny@r1-step-00000010", "tiny", "r1-step-00000010")
    assert (summary.route, summary.source_lang, summary.target_lang) == ("translate", "en", "fr")
    assert (summary.input_columns, summary.labels, summary.max_tokens) == (("source",), (), 32)
    classes = load_engine(tiny_checkpoint("image-classification")[0]).summary
    assert (classes.route, classes.labels, classes.source_lang) == ("classify", ("0", "1", "2"), None)


def test_beams_and_the_longest_answer_are_options() -> None:
    engine = load_engine(tiny_checkpoint()[0])
    items = [{"source": row["source"]} for row in PAIRS]
    assert engine.answer(items, {"num_beams": 3, "max_new_tokens": 2}) != []
    one, many = (engine.answer(items[:1], {"max_new_tokens": n})[0] for n in (1, 8))
    assert not isinstance(one, ItemError) and not isinstance(many, ItemError)
    assert len(one["text"]) < len(many["text"])


def test_weights_that_do_not_fit_are_refused_by_name() -> None:
    checkpoint, _ = tiny_checkpoint()
    tensors = checkpoint.tensors()
    removed = tensors.pop("model.shared.weight")
    with pytest.raises(CheckpointDamagedError, match=r"missing \['model.shared.weight'\], unknown none"):
        load_engine(FakeCheckpoint(checkpoint.config(), checkpoint.files(), tensors))
    with pytest.raises(CheckpointDamagedError, match=r"model.shared.weight is \(1, 16\) in the checkpoint"):
        tensors = {**tensors, "model.shared.weight": removed[:1]}
        load_engine(FakeCheckpoint(checkpoint.config(), checkpoint.files(), tensors))


def test_the_model_runs_in_one_thread_and_the_event_loop_stays_free() -> None:
    engine, _ = echo_engine()
    threads: set[str] = set()
    held, release = threading.Event(), threading.Event()

    def run(items: Sequence[Prepared], options: Mapping[str, Any]) -> list[Answer | ItemError]:
        threads.add(threading.current_thread().name)
        held.set()
        assert release.wait(30), "the event loop was not free to release the model"
        return engine.run(items, options)

    async def main() -> list[Answer | ItemError]:
        model = ModelThread()
        batcher = Batcher(in_batches(lambda items, options: model.call(run, items, options)), LIMITS)
        prepared = [engine.prepare({"source": f"text {i}"}) for i in range(3)]
        tasks = [
            asyncio.create_task(batcher.submit(item, num_tokens=item.num_tokens))
            for item in prepared
            if isinstance(item, Prepared)
        ]
        while not held.is_set():
            await asyncio.sleep(0.001)
        release.set()
        answers = await asyncio.gather(*tasks)
        await batcher.close()
        model.close()
        return answers

    assert texts(asyncio.run(main())) == ["TEXT 0", "TEXT 1", "TEXT 2"]
    assert len(threads) == 1 and threads != {threading.current_thread().name}


def test_a_model_that_calls_exit_does_not_end_the_event_loop() -> None:
    def run(items: Sequence[int], options: Mapping[str, Any]) -> list[int]:
        raise SystemExit(3)

    async def main() -> None:
        model = ModelThread()
        batcher = Batcher(in_batches(lambda items, options: model.call(run, items, options)), LIMITS)
        with pytest.raises(RuntimeError, match="the model raised SystemExit"):
            await batcher.submit(1, num_tokens=1)
        model.close()

    asyncio.run(main())


def test_a_large_batch_is_cut_where_too_much_of_it_would_be_padding() -> None:
    lengths = [300] * 3 + [40] * 30
    limits = BatchLimits(64, 100_000)
    assert [len(batch) for batch in cut_batches(lengths, limits)] == [33]
    batches = cut_batches(lengths, limits, max_padding_share=0.2)
    assert [sorted(lengths[i] for i in batch) for batch in batches] == [[300] * 3, [40] * 30]
    assert [len(batch) for batch in cut_batches([60, 2, 2, 2], limits, max_padding_share=0.2)] == [4]
