"""Every cell of the support matrix gives the result of one process, or an error that says why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from ranks import RankGroup
from support import CELLS, FAMILIES, GLOBAL_BATCH_SIZE, REFUSED, Cell, as_markdown, count_trained, refusal_of
from training import examples_of

from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray_jobs.data.dataset import PreparedData
from eagleray_jobs.data.prepare import prepare
from eagleray_jobs.verify.layouts import config_for_check
from eagleray_jobs.verify.runner import Runner

DOCUMENT = Path(__file__).parents[2] / "docs" / "layouts.md"
BEGIN, END = "<!-- support: begin -->\n", "<!-- support: end -->"
SAMPLE = {
    "marian-fsdp3",
    "marian-pp3-1F1B",
    "t5-tp2",
    "t5-pp2.fsdp2-1F1B",
    "bert-pp2-ZBVZeroBubble",
    "distilbert-tp3",
    "vit-pp2.tp2-Interleaved1F1B",
    "own_module-hsdp2x2",
    "own_module-pp2-InterleavedZeroBubble",
}
Runners = Callable[[str, int], Runner]


@pytest.fixture(scope="module")
def runners(group: Callable[[int], RankGroup], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runners]:
    """`runners(family, num_layers)`: a model of that many layers, one process trained; the rows are shared."""
    folder = tmp_path_factory.mktemp("support")
    store = ObjectStore.open(str(folder / "rows"))
    prepared: dict[str, PreparedData] = {}
    made: dict[tuple[str, int], Runner] = {}
    with ExitStack() as stack:

        def of(family: str, num_layers: int) -> Runner:
            if (family, num_layers) not in made:
                file = file_of(family, num_layers, folder)
                if family not in prepared:
                    prepared[family] = prepare(file, load_task(file), store)
                checked, _ = config_for_check(file, 2)
                made[family, num_layers] = stack.enter_context(Runner(checked, prepared[family], group))
            return made[family, num_layers]

        yield of


def file_of(family: str, num_layers: int, folder: Path) -> RunConfig:
    """Make the file of a family."""
    task, model = FAMILIES[family].task, FAMILIES[family].model(num_layers)
    data: dict[str, Any] = {"source": "digits"}
    if task != "image-classification":
        rows = folder / f"{task}.jsonl"
        rows.write_text("".join(json.dumps(row) + "\n" for row in examples_of(task, 120)))
        data = {"train": str(rows), "validation_split": 0.0, "test_split": 0.0}
        model |= {"tokenizer": {"vocab_size": 304}}
    train = {"max_steps": 9, "global_batch_size": GLOBAL_BATCH_SIZE, "optim": "sgd", "learning_rate": 0.1}
    value = {"name": "cell", "task": task, "model": model, "data": data, "train": train | {"ddp_timeout": 60.0}}
    return RunConfig.model_validate(value)


def test_the_matrix_has_as_many_cells_as_it_says() -> None:
    assert len(CELLS) == len(set(map(str, CELLS))) == 6 * 103
    assert count_trained(CELLS) == 464
    assert Counter(cell.layout.num_workers for cell in CELLS) == {1: 6, 2: 48, 3: 48, 4: 156, 8: 360}
    assert {str(cell) for cell in CELLS} >= SAMPLE
    assert {refusal_of(cell) for cell in CELLS} == {None, *REFUSED}


def test_the_document_holds_the_matrix() -> None:
    before, _, rest = DOCUMENT.read_text().partition(BEGIN)
    found, _, _ = rest.partition(END)
    assert before and found.strip() == as_markdown(), f"put this between the marks:\n{as_markdown()}"


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param(cell, id=str(cell), marks=() if str(cell) in SAMPLE else pytest.mark.slow)
        for cell in sorted(CELLS, key=lambda cell: list(FAMILIES).index(cell.family))
        if refusal_of(cell) is None
    ],
)
def test_a_supported_cell_gives_what_one_process_gives(runners: Runners, cell: Cell) -> None:
    found = runners(cell.family, cell.num_layers).compare(cell.layout, options=options_of(cell))
    assert found.passed, [str(mismatch) for mismatch in found.mismatches]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_cell_that_is_not_supported_says_why(runners: Runners, family: str) -> None:
    refused = [(cell, refusal) for cell in CELLS if cell.family == family and (refusal := refusal_of(cell))]
    assert len(refused) == (41 if FAMILIES[family].is_encoder_decoder else 18)
    for cell, refusal in refused:
        found = runners(family, cell.num_layers).refusals([cell.layout], options_of(cell))
        assert refusal.message in str(found[cell.layout])


@pytest.mark.slow
@pytest.mark.parametrize("refusal", REFUSED, ids=lambda refusal: refusal.reason)
def test_asking_for_what_is_not_supported_is_the_same_error(runners: Runners, refusal: Any) -> None:
    cell = next(cell for cell in CELLS if refusal_of(cell) is refusal)
    with pytest.raises(ConfigError, match=refusal.message):
        runners(cell.family, cell.num_layers).compare(cell.layout, options=options_of(cell))


def options_of(cell: Cell) -> dict[str, Any]:
    """Return the keys of `parallel` besides the degrees."""
    return {} if cell.schedule is None else {"pipeline_parallel_schedule": cell.schedule}
