"""Rows enter, leave and are dropped while others go on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from fake_checkpoint import tiny_checkpoint
from random_models import marian, sources
from tiny_models import PAIRS

from eagleray.config.schema import ServeConfig
from eagleray.engine import Batcher, ItemError, ModelThread, Prepared, load_engine
from eagleray.engine.continuous import ItemSession
from eagleray.engine.decoder import DecodingSession, NetworkGenerator
from eagleray.engine.decoder.families import build_network
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits
from eagleray.engine.work import Entering

ROWS = sources(12)
# What decodes step by step, also where CTranslate2 is installed.
OURS = ServeConfig(engine="torch")


def generator(limits: BatchLimits) -> NetworkGenerator:
    return NetworkGenerator.of(marian(), limits)


def alone(row: list[int], options: DecodingOptions) -> list[int]:
    return generator(BatchLimits(1, 4096)).generate([row], options)[0][1:]


def session(options: DecodingOptions, limits: BatchLimits) -> DecodingSession:
    return DecodingSession(build_network(marian()), generator(limits).rules(options), limits)


def run(decoding: DecodingSession, found: dict[int, list[int]]) -> dict[int, list[int]]:
    while not decoding.is_idle:
        found.update((decoded.ticket, decoded.tokens) for decoded in decoding.step())
    return found


@pytest.mark.parametrize("num_beams", [1, 3])
def test_rows_that_join_at_any_time_are_answered_as_alone(num_beams: int) -> None:
    options = DecodingOptions(num_beams, max_new_tokens=40)  # more columns than a cache starts with
    decoding, found, tickets = session(options, BatchLimits(5, 4096)), {}, []
    for number, row in enumerate(ROWS):
        tickets.append(decoding.add(row))
        for _ in range(number % 4 * 5):
            found.update((decoded.ticket, decoded.tokens) for decoded in decoding.step())
    run(decoding, found)
    assert [found[ticket] for ticket in tickets] == [alone(row, options) for row in ROWS]


@pytest.mark.parametrize("num_beams", [1, 3])
def test_dropped_rows_are_gone_and_the_others_do_not_notice(num_beams: int) -> None:
    options = DecodingOptions(num_beams, max_new_tokens=12)
    decoding = session(options, BatchLimits(4, 4096))
    tickets = [decoding.add(row) for row in ROWS[:6]]
    found = {decoded.ticket: decoded.tokens for _ in range(2) for decoded in decoding.step()}
    dropped = {tickets[1], tickets[5]} - found.keys()  # one that runs, one that waits
    assert len(dropped) == 2
    decoding.drop(dropped)
    run(decoding, found)
    expected = {ticket: alone(ROWS[ticket], options) for ticket in tickets if ticket not in dropped}
    assert found == expected


def test_no_more_rows_and_source_tokens_run_at_once_than_the_limits_say() -> None:
    decoding = session(DecodingOptions(max_new_tokens=1), BatchLimits(4, 40))
    for row in [[5] * 25, [5] * 9, [5] * 9, [5] * 9, [5] * 9, [5] * 50]:
        decoding.add(row)
    found: list[list[int]] = []
    while not decoding.is_idle:
        found.append([decoded.ticket for decoded in decoding.step()])
    ended = [tickets for tickets in found if tickets]
    # After one token each row ends: those end together that ran together.
    assert ended == [[0], [1, 2, 3, 4], [5]]


def test_a_row_of_numbers_that_are_none_does_not_harm_those_that_take_its_place() -> None:
    model: Any = marian(share_encoder_decoder_embeddings=False, tie_word_embeddings=False)
    options, limits = DecodingOptions(max_new_tokens=8), BatchLimits(2, 4096)
    clean = [row for row in ROWS if 58 not in row][:5]
    expected = NetworkGenerator.of(model, limits).generate(clean, options)
    with torch.no_grad():
        model.model.encoder.embed_tokens.weight[58] = float("nan")
    decoding = DecodingSession(build_network(model), NetworkGenerator.of(model, limits).rules(options), limits)
    for row in ([58] * 30, [58] * 30, *clean):
        decoding.add(row)
    found = run(decoding, {})
    assert [found[2 + number] for number in range(5)] == [row[1:] for row in expected]


def test_a_row_in_a_hurry_begins_before_those_that_wait_and_as_soon_as_one_slot_is_free() -> None:
    options, limits = DecodingOptions(max_new_tokens=6), BatchLimits(8, 4096)
    decoding = DecodingSession(build_network(marian()), generator(limits).rules(options), limits, num_slots=8)
    first = [decoding.add(row) for row in ROWS[:7]]
    assert decoding.tokens_so_far(first[0]) is None
    decoding.step()
    patient, hurried = decoding.add(ROWS[7]), decoding.add(ROWS[8], at_once=True)
    assert decoding.step() == []
    assert decoding.tokens_so_far(patient) is None
    assert decoding.tokens_so_far(hurried) == alone(ROWS[8], options)[:1]


def test_an_engine_streams_text_that_ends_as_its_answer() -> None:
    engine = load_engine(tiny_checkpoint()[0], serve=OURS)
    long = " ".join(f"{row['source']}." for row in PAIRS * 4)
    for text in ("two hours", long):
        *partial, last = engine.stream({"source": text}, {"max_new_tokens": 8})
        (answer,) = engine.answer([{"source": text}], {"max_new_tokens": 8})
        assert last == answer and not isinstance(last, ItemError)
        assert partial and all(not isinstance(each, ItemError) for each in partial)
    assert [error.code for error in engine.stream({"source": 3})] == ["invalid_item"]  # type: ignore[union-attr]


def test_items_enter_and_leave_an_engine_at_work_and_are_answered_as_alone() -> None:
    engine = load_engine(tiny_checkpoint()[0], serve=OURS, limits=BatchLimits(4, 4096))
    long = " ".join(f"{row['source']}." for row in PAIRS * 4)
    texts = [row["source"] for row in PAIRS] + [long]
    options = {"max_new_tokens": 8}
    prepared = [engine.prepare({"source": text}) for text in texts]
    stepper, found = engine.stepper(options), {}
    assert stepper is not None
    for key, item in enumerate(prepared):
        assert isinstance(item, Prepared)
        stepper.add(Entering(key, item, at_once=key % 2 == 0))
        if key == 1:
            stepper.drop([0])
        found.update((ended.key, ended.result) for ended in stepper.step())
    while not stepper.is_idle:
        found.update((ended.key, ended.result) for ended in stepper.step())
    expected = engine.answer([{"source": text} for text in texts[1:]], options)
    assert found == dict(enumerate(expected, start=1))


def test_a_session_that_fails_answers_in_batches_and_only_the_item_at_fault_fails() -> None:
    engine = load_engine(tiny_checkpoint()[0], serve=OURS)
    options = {"max_new_tokens": 8}
    good, bad = engine.prepare({"source": "two hours"}), engine.prepare({"source": "three days"})
    assert isinstance(good, Prepared) and isinstance(bad, Prepared)
    bad = replace(bad, features=({"input_ids": [10**6]},))
    stepper = engine.stepper(options)
    assert stepper is not None
    for key, item in enumerate([good, bad, good]):
        stepper.add(Entering(key, item))
    found = {ended.key: ended.result for ended in stepper.step()}
    assert stepper.is_idle
    (expected,) = engine.answer([{"source": "two hours"}], options)
    assert found[0] == found[2] == expected
    assert isinstance(found[1], ItemError) and found[1].code == "model_failed"
    stepper.add(Entering(9, good))
    while not stepper.is_idle:
        found.update((ended.key, ended.result) for ended in stepper.step())
    assert found[9] == expected


def test_a_model_in_its_thread_takes_items_while_others_are_decoded() -> None:
    engine = load_engine(tiny_checkpoint()[0], serve=OURS, limits=BatchLimits(4, 4096))
    options = {"max_new_tokens": 8}
    texts = [row["source"] for row in PAIRS * 5]
    expected = engine.answer([{"source": text} for text in texts], options)
    partial: list[Any] = []

    async def main() -> list[Any]:
        thread = ModelThread()
        batcher = Batcher[Prepared, Any](thread.start(engine), engine.limits)

        async def ask(number: int, text: str) -> Any:
            await asyncio.sleep(0.001 * number)
            item = engine.prepare({"source": text})
            assert isinstance(item, Prepared)
            tell = partial.append if number == 0 else None
            return await batcher.submit(item, num_tokens=item.num_tokens, options=options, on_partial=tell)

        answers = await asyncio.gather(*(ask(number, text) for number, text in enumerate(texts)))
        await batcher.close()
        thread.close()
        return answers

    assert asyncio.run(main()) == expected
    first: Any = expected[0]
    assert partial and all(first["text"].startswith(answer["text"]) for answer in partial)


class EveryThirdToken:
    """A task whose answer changes with every third token."""

    def source_tokens(self, features: Any) -> list[int]:
        return features["input_ids"]  # type: ignore[no-any-return]

    def decoding(self, processor: Any, options: Any) -> DecodingOptions:
        return DecodingOptions(max_new_tokens=12)

    def decoded(self, tokens: Sequence[int], processor: Any) -> dict[str, Any]:
        return {"text": str(len(tokens) // 3)}

    partly_decoded = decoded


def test_what_a_token_does_not_change_is_not_told_again() -> None:
    found, told = generator(BatchLimits(4, 4096)), list[Any]()
    options = DecodingOptions(max_new_tokens=12)
    session = ItemSession(
        lambda: found.session(options),
        EveryThirdToken(),
        None,  # type: ignore[arg-type]
        found.start_token_id,
        lambda item, answers: answers[-1],  # type: ignore[arg-type,return-value]
        lambda items: [],
    )
    row = max(ROWS, key=lambda row: len(alone(row, options)))
    session.add(Entering(0, Prepared({}, ({},), ({"input_ids": row},), (len(row),)), on_partial=told.append))
    while not session.is_idle:
        session.step()
    assert len(told) > 1 and len({answer["text"] for answer in told}) == len(told)
