"""Rows enter, leave and are dropped while others go on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from fake_checkpoint import tiny_checkpoint
from random_models import marian, sources
from tiny_models import PAIRS

from eagleray.engine import ItemError, load_engine
from eagleray.engine.decoder import DecodingSession, NetworkGenerator
from eagleray.engine.decoder.families import build_network
from eagleray.engine.options import DecodingOptions
from eagleray.engine.plan import BatchLimits

ROWS = sources(12)


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


@pytest.mark.parametrize("num_beams", [1, 3])
def test_a_stream_grows_to_the_answer(num_beams: int) -> None:
    options = DecodingOptions(num_beams, max_new_tokens=10)
    for row in ROWS[:4]:
        partial = list(generator(BatchLimits(1, 4096)).stream(row, options))
        assert partial[-1][1:] == alone(row, options)
        if num_beams == 1:
            assert partial == [partial[-1][: length + 2] for length in range(len(partial))]


def test_an_engine_streams_text_that_ends_as_its_answer() -> None:
    engine = load_engine(tiny_checkpoint()[0])
    long = " ".join(f"{row['source']}." for row in PAIRS * 4)
    for text in ("two hours", long):
        *partial, last = engine.stream({"source": text}, {"max_new_tokens": 8})
        (answer,) = engine.answer([{"source": text}], {"max_new_tokens": 8})
        assert last == answer and not isinstance(last, ItemError)
        assert partial and all(not isinstance(each, ItemError) for each in partial)
    assert [error.code for error in engine.stream({"source": 3})] == ["invalid_item"]  # type: ignore[union-attr]
