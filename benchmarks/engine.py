"""The translation engine beside its peers: tokens per second of the same weights, with the same threads.

transformers' `generate`, fed with length-sorted batches of the size that suits it best and row by row; CTranslate2
with its own sorting, where it is installed; ours as a file has it by default, and our own loop in each precision.
All decode greedily, in one process and in turns: one round of all of them, then the next one, in another order.
The model is made so that it copies its source: every engine gives the same answers, as long as their sources.

    python benchmarks/engine.py [--quick] [--write docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from copying_model import PAD, Size, copying_model, sources
from engine_results import FIRST, OURS, PEERS, QUICK, Decode, Measured, Plan, Run, Side, report
from results_page import describe_machine, write_section

from eagleray.engine.ctranslate import write_model
from eagleray.engine.decoding import DecodingOptions, load_generator
from eagleray.engine.plan import BatchLimits


class Bench:
    """Measures all sides with one model and one number of threads."""

    def __init__(self, size: Size, num_threads: int, plan: Plan) -> None:
        torch.set_num_threads(num_threads)
        self._plan = plan
        self._options = DecodingOptions(max_new_tokens=2 * plan.longest)
        self._rows = sources(size, plan.num_rows, plan.longest)
        self._alone = sources(size, plan.num_alone, plan.longest, seed=1)
        self._model = copying_model(size, plan.longest)
        self._decoders = {side: self._load(side) for side in (*PEERS, *OURS) if is_installed(side)}
        self.best_batch_size = self._find_batch_size()

    def measure(self) -> Measured:
        """Run every side once in each round, on all rows and on rows one by one."""
        sides = list(self._decoders)
        for side in sides:
            self._decoders[side](self._rows[: self._plan.num_alone])
        runs: Measured = {side: [] for side in sides}
        for number in range(self._plan.num_rounds):
            turn = number % len(sides)
            for side in (*sides[turn:], *sides[:turn]):
                runs[side].append(self._run(side))
                shown = f"{runs[side][-1].together:,.0f} tokens/s, one by one {runs[side][-1].alone:,.0f}"
                print(f"round {number + 1}, {side.name}: {shown}", file=sys.stderr, flush=True)
        return runs

    def _run(self, side: Side) -> Run:
        decode = self._decoders[side]
        together, right = measure(decode, [self._rows])
        alone, _ = measure(decode, [[row] for row in self._alone])
        return Run(together, alone, right)

    def _find_batch_size(self) -> int:
        """Return the batch size with which transformers is fastest, each measured twice."""
        speeds = {}
        for size in self._plan.batch_sizes:
            batches = Transformers(self._model, self._options, size)
            speeds[size] = max(measure(batches, [self._rows])[0] for _ in range(2))
        best = max(speeds, key=speeds.__getitem__)
        self._decoders[FIRST] = Transformers(self._model, self._options, best)
        return best

    def _load(self, side: Side) -> Decode:
        if side is FIRST:
            return Transformers(self._model, self._options, 1)
        if side.engine == "ctranslate2":
            return CTranslate2(self._model, side.dtype, self._options, self._plan.max_items)
        limits = BatchLimits(self._plan.max_items, 2**62)
        generator = load_generator(self._model, limits, side.dtype, side.engine)
        assert generator is not None, "the model is of a known family"
        return lambda rows: generator.generate(rows, self._options)


class Transformers:
    """`generate` on length-sorted batches."""

    def __init__(self, model: Any, options: DecodingOptions, batch_size: int) -> None:
        self._model, self._options, self._batch_size = model, options, batch_size

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        order = sorted(range(len(rows)), key=lambda row: -len(rows[row]))
        answers: list[list[int]] = [[] for _ in rows]
        for start in range(0, len(rows), self._batch_size):
            chosen = order[start : start + self._batch_size]
            for row, answer in zip(chosen, self._generate([rows[row] for row in chosen]), strict=True):
                answers[row] = answer
        return answers

    def _generate(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        longest = max(map(len, rows))
        ids = torch.tensor([[*row] + [PAD] * (longest - len(row)) for row in rows])
        mask = (torch.arange(longest) < torch.tensor([len(row) for row in rows])[:, None]).long()
        with torch.inference_mode():
            found = self._model.generate(
                input_ids=ids, attention_mask=mask, num_beams=1, do_sample=False,
                max_new_tokens=self._options.max_new_tokens,
            )  # fmt: skip
        return [strip(row) for row in found.tolist()]


class CTranslate2:
    """CTranslate2 alone, given all rows at once: it sorts and cuts them itself, and each thread has a batch."""

    def __init__(self, model: Any, dtype: Any, options: DecodingOptions, max_batch_size: int) -> None:
        import ctranslate2

        num_threads = torch.get_num_threads()
        with tempfile.TemporaryDirectory() as folder:
            write_model(model, dtype, folder)
            self._translator = ctranslate2.Translator(
                folder, compute_type=dtype, inter_threads=num_threads, intra_threads=1
            )
        torch.set_num_threads(num_threads)  # it takes them from torch
        self._start = model.generation_config.decoder_start_token_id
        self._longest, self._max_batch_size = options.max_new_tokens, max_batch_size

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[list[int]]:
        found = self._translator.translate_batch(
            [list(map(str, row)) for row in rows], beam_size=1, max_batch_size=self._max_batch_size,
            max_decoding_length=self._longest, return_end_token=True,
        )  # fmt: skip
        return [[self._start, *map(int, each.hypotheses[0])] for each in found]


def strip(row: list[int]) -> list[int]:
    """Cut the padding behind an answer."""
    while len(row) > 1 and row[-1] == PAD:
        row.pop()
    return row


def measure(decode: Decode, calls: Sequence[Sequence[Sequence[int]]]) -> tuple[float, float]:
    """Return generated tokens per second, and the share of rows that were copied rightly."""
    started = time.perf_counter()
    answers = [decode(rows) for rows in calls]
    seconds = time.perf_counter() - started
    asked = [row for rows in calls for row in rows]
    generated = [answer[1:] for found in answers for answer in found]
    right = sum([*row] == answer for row, answer in zip(asked, generated, strict=True))
    return sum(map(len, generated)) / seconds, right / len(asked)


def is_installed(side: Side) -> bool:
    """Whether a side can be measured here."""
    return side.engine != "ctranslate2" or find_spec("ctranslate2") is not None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of few rows: a smoke run, no measurement")
    parser.add_argument("--rounds", type=int, help="rounds of all sides")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the section `engine` of this document")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    plan = replace(plan, num_rounds=options.rounds or plan.num_rounds)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    machine = describe_machine()
    tables = []
    for size in plan.sizes:
        for num_threads in plan.threads:
            bench = Bench(size, num_threads, plan)
            tables.append(report(size, num_threads, bench.measure(), bench.best_batch_size))
    about = (
        f"{machine}. Medians of {plan.num_rounds} interleaved rounds; {plan.num_rows} rows of 4 to {plan.longest} "
        f"tokens together, {plan.num_alone} one by one; a ratio is the median of the rounds' ratios."
    )
    text = "\n\n".join([about, *tables])
    print(text)
    if options.write is not None:
        write_section(options.write, "engine", text)


if __name__ == "__main__":
    main()
