"""The whole path in one program: train two models, serve both, ask held-out examples over HTTP, check the answers.

Run by `make demo`. It uses the command line and HTTP alone, as a user does. Exit status 1 if the answers are bad.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from eagleray.config.loader import load_files
from eagleray.config.schema import RunConfig
from eagleray.tasks import load_task
from eagleray_jobs.data.examples import ExampleReader, SkippedRows
from eagleray_jobs.data.sources import open_source, split_shares

FILES = ("configs/langid.yaml", "configs/en-fr.yaml")
EAGLERAY = (sys.executable, "-m", "eagleray.cli")
ASKED_PER_KIND = 25
NUM_SHOWN = 16
# The names of held-out territories, languages and currencies are words that a translator has never seen: their
# scores are shown as they are and decide nothing.
JUDGED_KINDS = {"en-fr": ("date", "unit", "list")}
PASS_SHARE = 0.90
BULK_YEARS = range(2000, 2030)
GROWING = "Tuesday, December 5, 2028"
CANARY, CANARY_PERCENT, CANARY_REQUESTS = "@step-300", 50, 40
TRAIN_TIMEOUT_S = 900
SERVE_TIMEOUT_S = 180
REQUEST_TIMEOUT_S = 30
# What a task is asked for over HTTP: route, list of answers, key of one answer.
WIRE = {
    "translation": ("translate", "translations", "text"),
    "text-classification": ("classify", "predictions", "label"),
}


@dataclass(frozen=True, slots=True)
class Question:
    """A held-out example, and its answer over HTTP.

    Attributes:
        kind: What sort of phrase it is.
        text: What is asked.
        expected: What the data says.
        answer: What the server says.
        milliseconds: From the request to the answer.
    """

    kind: str
    text: str
    expected: str
    answer: str = ""
    milliseconds: float = 0.0

    @property
    def is_right(self) -> bool:
        """Whether the answer is what the data says, to the letter."""
        return self.answer == self.expected


def main() -> int:
    """Train, serve, ask, judge."""
    console = Console(width=118, highlight=False)
    started = time.monotonic()
    console.rule(f"eagleray train {' '.join(FILES)}")
    subprocess.run([*EAGLERAY, "train", *FILES], check=True, timeout=TRAIN_TIMEOUT_S)
    console.rule(f"eagleray serve {' '.join(FILES)} --detach")
    server = _call("serve", *FILES, "--detach", "--port", "0")
    try:
        passed = [_examine(loaded.config, server["url"], console) for loaded in load_files(FILES)]
        passed.append(_in_lines(server["url"], console))
        _grow(server["url"], console)
        _by_hugging_face(server["url"], console)
        passed.append(_canary(server, console))
    finally:
        _call("serve", "stop", server["id"])
    _show_next_steps(console, time.monotonic() - started)
    return 0 if all(passed) else 1


def _call(*arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [*EAGLERAY, *arguments, "--json"], check=True, timeout=SERVE_TIMEOUT_S, stdout=subprocess.PIPE, text=True
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _examine(config: RunConfig, url: str, console: Console) -> bool:
    """Ask a model its held-out examples, show the answers and judge them."""
    # One client for all: a new one reads the certificates of the system first, which takes longer than an answer.
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
        questions = [_ask(config, client, question) for question in _held_out(config)]
    console.print(_table(config.name, questions))
    by_kind = defaultdict(list)
    for question in questions:
        by_kind[question.kind].append(question)
    shares = (f"{kind} {_share(asked):.0%}" for kind, asked in sorted(by_kind.items()))
    console.print(f"right by kind: {', '.join(shares)}")
    kinds = JUDGED_KINDS.get(config.name, tuple(by_kind))
    judged = [question for question in questions if question.kind in kinds]
    is_good = _share(judged) >= PASS_SHARE
    mean_ms = sum(question.milliseconds for question in questions) / len(questions)
    console.print(
        f"[bold]{config.name}: {'good' if is_good else 'BAD'}[/bold]: {_share(judged):.1%} of {len(judged)} "
        f"answers are right ({', '.join(sorted(kinds))}), at least {PASS_SHARE:.0%} should be; "
        f"{mean_ms:.0f} ms an answer\n"
    )
    return is_good


def _in_lines(url: str, console: Console) -> bool:
    """Ask for many texts in one request, and read the answers as they come; each must be that of its place."""
    days = [(day, year) for year in BULK_YEARS for day in range(1, 32)]
    texts = [f"July {day}, {year}" for day, year in days]
    expected = [f"{day} juillet {year}" for day, year in days]
    started = time.perf_counter()
    first_s, answers = 0.0, []
    for line in _stream(url, texts, "application/x-ndjson"):
        first_s = first_s or time.perf_counter() - started
        answers.append(json.loads(line))
    seconds = time.perf_counter() - started
    *items, last = answers
    right = sum(
        answer["index"] == place and answer["translation"]["text"] == text
        for place, (text, answer) in enumerate(zip(expected, items, strict=True))
    )
    console.print(
        f"{len(texts):,} texts in one request, answered in lines: the first after {first_s * 1000:.0f} ms, "
        f"all after {seconds:.1f} s; {right / len(texts):.1%} right, by {last['model']}@{last['version']}",
        soft_wrap=True,
    )
    return last["count"] == len(texts) and right >= len(texts) * PASS_SHARE


def _grow(url: str, console: Console) -> None:
    """Show one text's translation as it grows."""
    lines = _stream(url, GROWING, "text/event-stream")
    grown = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    steps = " > ".join(answer["text"] for answer in grown[:-1])
    console.print(f"{GROWING!r} while it grows: {steps}\n", soft_wrap=True)


def _by_hugging_face(url: str, console: Console) -> None:
    """Ask as Hugging Face's clients do."""
    response = httpx.post(f"{url}/models/en-fr", json={"inputs": GROWING}, timeout=REQUEST_TIMEOUT_S)
    response.raise_for_status()
    console.print(f"as Hugging Face's clients ask, POST /models/en-fr: {response.text}", soft_wrap=True)


def _canary(server: dict[str, Any], console: Console) -> bool:
    """Give an older version half of the requests, and go back: nothing may fail, and both must answer."""
    before = _answering(server["url"])
    _call("serve", "canary", "langid", CANARY, "--percent", str(CANARY_PERCENT), "--server", server["id"])
    during = _answering(server["url"])
    _call("serve", "rollback", "langid", "--server", server["id"])
    after = _answering(server["url"])
    shown = (
        ", ".join(f"{count} by {version}" for version, count in sorted(versions.items()))
        for versions in (before, during, after)
    )
    console.print("{} requests: {}; with a canary: {}; after rollback: {}\n".format(CANARY_REQUESTS, *shown))
    return len(before) == 1 and len(during) == 2 and after == before


def _answering(url: str) -> Counter[str]:
    """Ask for some classes; return how many answers each version gave."""
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client:
        answers = [client.post("/v1/classify", json={"text": GROWING}) for _ in range(CANARY_REQUESTS)]
    for answer in answers:
        answer.raise_for_status()
    return Counter(answer.json()["version"] for answer in answers)


def _stream(url: str, text: str | list[str], accept: str) -> Iterator[str]:
    """Yield the lines of an answer as they come."""
    with (
        httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S) as client,
        client.stream("POST", "/v1/translate", json={"text": text}, headers={"accept": accept}) as response,
    ):
        response.raise_for_status()
        yield from response.iter_lines()


def _held_out(config: RunConfig) -> Iterator[Question]:
    """Yield test examples, as many of each kind."""
    task = load_task(config)
    reader = ExampleReader(config.data, task.columns, task.input_columns, split_shares(config.data))
    by_kind = defaultdict(list)
    for piece in open_source(config.data).pieces:
        for _, split, example in reader.read(piece, SkippedRows()):
            if split == "test":
                kind, (text, expected) = str(example["kind"]), (example[column] for column in task.columns)
                by_kind[kind].append(Question(kind, str(text), str(expected)))
    draw = random.Random(0)
    for kind in sorted(by_kind):
        yield from draw.sample(by_kind[kind], min(ASKED_PER_KIND, len(by_kind[kind])))


def _ask(config: RunConfig, client: httpx.Client, question: Question) -> Question:
    verb, answers, key = WIRE[config.task]
    started = time.perf_counter()
    response = client.post(f"/v1/{verb}", json={"text": question.text})
    milliseconds = (time.perf_counter() - started) * 1000
    response.raise_for_status()
    return replace(question, answer=str(response.json()[answers][0][key]), milliseconds=milliseconds)


def _table(name: str, questions: Sequence[Question]) -> Table:
    table = Table(title=f"{name}: held-out examples, over HTTP", title_justify="left")
    for column in ("kind", "input", "answer", "expected", ""):
        table.add_column(column, overflow="fold")
    table.add_column("ms", justify="right")
    for question in questions[:: max(1, len(questions) // NUM_SHOWN)]:
        mark = "[green]right[/green]" if question.is_right else "[red]wrong[/red]"
        row = (question.kind, question.text, question.answer, question.expected, mark)
        table.add_row(*row, f"{question.milliseconds:.0f}")
    return table


def _share(questions: Sequence[Question]) -> float:
    return sum(question.is_right for question in questions) / len(questions)


def _show_next_steps(console: Console, elapsed_s: float) -> None:
    console.rule(f"done in {elapsed_s:.0f} s")
    console.print("en-fr translates localised phrases (dates, units, amounts, lists), not general text.")
    console.print(f"The store is {Path('store').absolute()}. Go on with:\n", soft_wrap=True)
    for command in ("models list", "evaluate configs/en-fr.yaml", f"serve {' '.join(FILES)}"):
        console.print(f"  .venv/bin/eagleray {command}")
    console.print("\nand then open http://127.0.0.1:8000/ and type.")


if __name__ == "__main__":
    sys.exit(main())
