"""`predict` beside the engine alone: rows per second of a pool of actors and of one process without Ray.

One thread each. A model with random weights translates a file of random words; all sides must write
the same bytes. The way to the first chunk
(starting Ray, loading the model) is left out, since it does not grow with the file: the speed is that of the rows
between the first and the last chunk. All sides take turns: one round of all of them, then the next one.

    python benchmarks/predict.py [--quick] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; Ray's workers inherit it

from copying_model import EOS, FIRST_WORD, PAD, Size, copying_model
from results_page import describe_machine, markdown_table, write_section

SIZE = Size(width=256, num_layers=3, vocab_size=2000)
LONGEST_SOURCE = 44
TARGET = 0.9


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is measured.

    Attributes:
        num_rows: Rows of the file.
        num_rounds: Rounds of all sides.
    """

    num_rows: int = 8_000
    num_rounds: int = 3


QUICK = Plan(num_rows=2_500, num_rounds=1)


@dataclass(frozen=True, slots=True)
class Pool:
    """A side: so many actors, or none: the engine in one process."""

    num_actors: int

    @property
    def name(self) -> str:
        """How the table calls it."""
        return f"predict, {self.num_actors} actors" if self.num_actors else "engine alone, one process"


ALONE, ONE, TWO = Pool(0), Pool(1), Pool(2)


class Progress:
    """Hears of finished chunks."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, int]] = []

    def __call__(self, message: str) -> None:
        """Take one of `predict`'s lines: `predict: 3 of 16 chunks`."""
        words = message.split()
        if words[0] == "predict:" and words[-1] == "chunks":
            self._seen.append((time.monotonic(), int(words[1])))

    def chunks_per_s(self, num_at_first: int) -> float:
        """Return the speed from the end of the first chunks of all actors to the end of the last one."""
        (begin_s, begin), (end_s, end) = self._seen[num_at_first - 1], self._seen[-1]
        return (end - begin) / (end_s - begin_s)


def make_version(folder: Path) -> Any:
    """Commit the copying model; return the store."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    from eagleray.store.objects import ObjectStore
    from eagleray_jobs.import_model import import_model

    words = {"</s>": EOS, "<pad>": PAD} | {f"w{n}": n for n in range(FIRST_WORD, SIZE.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    directory = folder / "copier"
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<pad>",
        model_max_length=2 * LONGEST_SOURCE,
    ).save_pretrained(directory)  # fmt: skip
    copying_model(SIZE, LONGEST_SOURCE).save_pretrained(directory)
    store = ObjectStore.open(str(folder / "store"))
    import_model(store, directory, "copier", "translation", source_lang="en", target_lang="fr")
    return store


def write_rows(path: Path, count: int) -> None:
    """Write lines of 4 to 44 random words."""
    draw = random.Random(0)
    lines = (
        " ".join(f"w{draw.randrange(FIRST_WORD, SIZE.vocab_size)}" for _ in range(draw.randint(4, LONGEST_SOURCE)))
        for _ in range(count)
    )
    path.write_text("".join(f"{line}\n" for line in lines))


def measure(plan: Plan, folder: Path) -> Mapping[Pool, Sequence[float]]:
    """Return the rows per second of each side in each round."""
    import torch

    from eagleray.cluster import connect
    from eagleray.store.registry import Registry
    from eagleray.tasks import load_task
    from eagleray_jobs.pool import ActorPool, CheckpointLoader, run_in_line
    from eagleray_jobs.predict import predict
    from eagleray_jobs.rowformats import ROWS_PER_CHUNK

    torch.set_num_threads(1)
    store = make_version(folder)
    rows = folder / "rows.txt"
    write_rows(rows, plan.num_rows)
    checkpoint = Registry(store).open("copier")
    config, load = checkpoint.config(), CheckpointLoader(store, "copier", checkpoint.version)

    answers: set[bytes] = set()

    def run(pool: Pool, output: Path) -> float:
        run_items: Callable[..., Any] = ActorPool(pool.num_actors, 1) if pool.num_actors else run_in_line
        progress = Progress()
        task = load_task(config)
        predict(config, checkpoint.ref, load, run_items, task, str(rows), str(output), notify=progress)
        answers.add(output.read_bytes())
        if len(answers) > 1:
            raise SystemExit(f"{pool.name}: the answers are not those of the other sides")
        return progress.chunks_per_s(max(1, pool.num_actors)) * ROWS_PER_CHUNK

    found: dict[Pool, list[float]] = {pool: [] for pool in (ALONE, ONE, TWO)}
    with connect(None):
        for number in range(plan.num_rounds):
            sides = list(found)
            for pool in (*sides[number % 3 :], *sides[: number % 3]):
                found[pool].append(run(pool, folder / f"answers-{pool.num_actors}-{number}.txt"))
                print(
                    f"round {number + 1}, {pool.name}: {found[pool][-1]:,.0f} rows/s", file=sys.stderr, flush=True
                )
    return found


def ratio(found: Mapping[Pool, Sequence[float]], pool: Pool) -> float:
    """Return the median of the rounds' shares of what as many engines alone would do."""
    return statistics.median(
        mine / (pool.num_actors * alone) for mine, alone in zip(found[pool], found[ALONE], strict=True)
    )


def report(found: Mapping[Pool, Sequence[float]]) -> str:
    """Lay out the table."""
    rows = [[ALONE.name, f"{statistics.median(found[ALONE]):,.0f}", "1.00", ""]]
    for pool in (ONE, TWO):
        speed = f"{statistics.median(found[pool]):,.0f}"
        rows.append([pool.name, speed, f"{ratio(found, pool):.2f}", f">= {TARGET}"])
    return markdown_table([f"{SIZE.name}; 1 thread each", "rows/s", "of actors x engine alone", "target"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few rows: no measurement")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace its section `predict`")
    options = parser.parse_args()
    plan, machine = QUICK if options.quick else Plan(), describe_machine()
    with tempfile.TemporaryDirectory(prefix="eagleray-predict-") as folder:
        table = report(measure(plan, Path(folder)))
    text = f"{machine}. Medians of {plan.num_rounds} interleaved rounds of {plan.num_rows:,} rows.\n\n{table}"
    print(text)
    if options.write is not None:
        write_section(options.write, "predict", text)


if __name__ == "__main__":
    main()
