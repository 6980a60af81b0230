"""One model over several ranks answers as one process does, whatever wrote its checkpoint."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup
from served import RankProcesses, RanksOfGroup, commit, commit_again, items, share_read

from eagleray.config.layout import Layout, parse_layout
from eagleray.config.schema import ServeConfig
from eagleray.engine import Engine, ItemError, Prepared, load_engine
from eagleray.engine.decoder.families import build_network
from eagleray.engine.decoder.network import Decoder
from eagleray.engine.group import GroupPlace, load_group
from eagleray.errors import RanksLostError
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore

Groups = Callable[[int], RankGroup]
SMALL = {"max_batch_size": 24, "max_batch_tokens": 4096}  # rows enter and leave all the time


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def committed(store: Path) -> Callable[[str], Checkpoint]:
    """`committed(family)`: a version that one process wrote."""
    found: dict[str, Checkpoint] = {}

    def of(family: str) -> Checkpoint:
        if family not in found:
            found[family] = commit(family, store)
        return found[family]

    return of


@contextmanager
def served(checkpoint: Checkpoint, layout: Layout, group: Groups, **serve: Any) -> Iterator[Engine]:
    degrees = {"tensor_parallel_degree": layout.tensor, "pipeline_parallel_degree": layout.pipeline}
    config = ServeConfig(**SMALL, **degrees, **serve)
    place = GroupPlace(RanksOfGroup(group(layout.num_workers)), has_process_group=True)
    engine = load_group(checkpoint, config, place)
    try:
        yield engine
    finally:
        engine.close()


def by_one(checkpoint: Checkpoint, asked: list[dict[str, Any]], options: dict[str, Any], **serve: Any) -> Any:
    return load_engine(checkpoint, serve=ServeConfig(**SMALL, **serve)).answer(asked, options)


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("family", ["marian", "t5"])
def test_translations_are_those_of_one_process(
    family: str, layout: str, group: Groups, committed: Callable[[str], Checkpoint]
) -> None:
    checkpoint, asked = committed(family), items(family)
    with served(checkpoint, parse_layout(layout), group) as engine:
        for options in ({"num_beams": 1}, {"num_beams": 4}):
            answers = engine.answer(asked, options)
            assert answers == by_one(checkpoint, asked, options)
        assert len({answer["text"] for answer in answers}) > 30, "the model does not say enough to compare"


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "own"])
def test_scores_are_those_of_one_process(
    family: str, layout: str, group: Groups, committed: Callable[[str], Checkpoint]
) -> None:
    checkpoint, asked = committed(family), items(family)
    with served(checkpoint, parse_layout(layout), group) as engine:
        answers = engine.answer(asked)
    expected = by_one(checkpoint, asked, {})
    for answer, other in zip(answers, expected, strict=True):
        assert answer["scores"] == pytest.approx(other["scores"], abs=1e-6)
    assert len({answer["label"] for answer in answers}) > 1, "the model does not say enough to compare"


@pytest.mark.parametrize(
    "writer, reader",
    [
        ("pp2", "tp2"),
        pytest.param("fsdp2.tp2", "tp2", marks=pytest.mark.slow),
        pytest.param("fsdp2.tp2", "pp2", marks=pytest.mark.slow),
        pytest.param("tp2", "pp2.tp2", marks=pytest.mark.slow),
    ],
)
def test_whatever_layout_wrote_a_checkpoint_any_group_answers_with_it(
    writer: str, reader: str, group: Groups, store: Path, committed: Callable[[str], Checkpoint]
) -> None:
    checkpoint, asked, layout = committed("marian"), items("marian")[:80], parse_layout(writer)
    step = 20 + sum(map(ord, writer + reader))
    group(layout.num_workers).run(commit_again, str(store), "marian", layout, step)
    again = Checkpoint.open(ObjectStore.open(str(store)), "marian", f"r1-step-{step:08d}")
    with served(again, parse_layout(reader), group) as engine:
        assert engine.answer(asked) == by_one(checkpoint, asked, {})


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_each_rank_reads_its_own_ranges(
    layout: str, group: Groups, store: Path, committed: Callable[[str], Checkpoint]
) -> None:
    committed("wide")
    shares = group(2).run(share_read, str(store), "wide", parse_layout(layout))
    if layout == "tp2":  # norms and the positions' tables are whole on both
        assert all(0.45 < share < 0.56 for share in shares), shares
    else:  # the stages' layers are balanced by their cost; both ends hold the embedding, which is tied
        assert all(0.3 < share < 0.75 for share in shares) and sum(shares) < 1.1, shares


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_lower_precision_is_no_less_precise_than_in_one_process(
    dtype: Any, layout: str, group: Groups, committed: Callable[[str], Checkpoint]
) -> None:
    checkpoint = committed("wide")
    model: Any = load_engine(checkpoint).model
    with served(checkpoint, parse_layout(layout), group, dtype=dtype) as engine:
        found = first_scores(engine.model.generator._network)  # type: ignore[union-attr, arg-type]
    exact, alone = (first_scores(build_network(model, each)) for each in ("float32", dtype))
    # Each part is rounded by itself: other errors, and no larger ones.
    assert 0 < (found - exact).norm() < 1.5 * (alone - exact).norm()
    assert (alone - exact).norm() < 0.1 * exact.norm()


@torch.inference_mode()
def first_scores(network: Decoder) -> torch.Tensor:
    """Scores of the first token of some rows."""
    rows = [[5 + (7 * row + 3 * place) % 200 for place in range(3 + row)] for row in range(16)]
    cache = network.make_cache(1, len(rows))
    network.admit(rows, cache)
    return network.step(torch.zeros(len(rows), dtype=torch.int64), cache).float()


@pytest.mark.parametrize("layout", ["tp2", "pp2"])
def test_what_the_model_raises_fails_alone_and_the_group_goes_on(
    layout: str, group: Groups, committed: Callable[[str], Checkpoint]
) -> None:
    checkpoint, asked = committed("marian"), items("marian")[:4]
    with served(checkpoint, parse_layout(layout), group) as engine:
        good = [engine.prepare(item) for item in asked]
        features = {"input_ids": [5] * 100}  # there are no more than 64 places
        bad = Prepared({"source": ""}, ({"source": ""},), (features,), (100,))
        prepared = [item for item in (*good[:2], bad, *good[2:]) if isinstance(item, Prepared)]
        answers = engine.run(prepared)
        assert isinstance(answers[2], ItemError) and answers[2].code == "model_failed"
        assert [*answers[:2], *answers[3:]] == by_one(checkpoint, asked, {})
        *_, last = engine.stream(asked[3])
        assert last == answers[4]


@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
def test_a_lost_rank_is_noticed_while_it_computes_and_while_it_waits(
    sent: signal.Signals, committed: Callable[[str], Checkpoint]
) -> None:
    launch, lost = RankProcesses(), []
    timeout_s = 3.0
    config = ServeConfig(tensor_parallel_degree=2, rank_timeout_s=timeout_s)
    engine = load_group(committed("marian"), config, GroupPlace(launch, on_lost=lost.append))
    try:
        asked = items("marian")
        assert len(engine.answer(asked[:8])) == 8
        pid = launch.processes[1].pid
        assert pid is not None
        threading.Timer(0.1, os.kill, (pid, sent)).start()
        begin = time.monotonic()
        with pytest.raises(RanksLostError):
            while time.monotonic() - begin < 60:
                engine.answer(asked)
        assert time.monotonic() - begin < timeout_s + 5
        assert len(lost) == 1
        with pytest.raises(RanksLostError):
            engine.answer(asked[:1])
    finally:
        engine.close()
    assert not any(process.is_alive() for process in launch.processes)


def test_ranks_end_with_the_process_that_leads_them(committed: Callable[[str], Checkpoint], store: Path) -> None:
    launch = RankProcesses()
    config = ServeConfig(pipeline_parallel_degree=2)
    engine = load_group(committed("bert"), config, GroupPlace(launch))
    assert engine.answer(items("bert")[:2])
    model: torch.nn.Module = engine.model
    for connection in model._link._connections:  # type: ignore[union-attr]
        connection.close()  # what the kernel does when it ends
    for process in launch.processes:
        process.join(20)
        assert process.exitcode == 0
    engine.close()
