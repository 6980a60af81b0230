"""The way of a request beside its peers, large requests with small ones beside them, and how replicas come.

    python benchmarks/serving.py requests|bulk|scaling [--quick] [--write docs/benchmarks.md]

`requests`: the same no-op behind `eagleray serve`, behind what Ray Serve's documentation shows (an ingress, a
batched deployment, the Python proxy), LitServe, and plain FastAPI. Each side is started alone; one round of all of
them, then the next one in another order. `bulk`: a translator with one thread per replica. `scaling`: a
second replica of it, with the defaults of autoscaling.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import httpx
from http_load import Loaded, client_name, load
from prometheus_client.parser import text_string_to_metric_families
from results_page import describe_machine, write_section
from serving_results import (
    OURS,
    PATTERN,
    BulkRun,
    Replicas,
    ScaledUp,
    report_bulk,
    report_requests,
    report_scaling,
)
from serving_setup import commit, noop_file, sentences, serving, translation_file

PEERS = Path(__file__).parent / "peers" / "served_noop.py"
SIDES = (OURS, PATTERN, "LitServe", "FastAPI, no Ray")
PEER_NAMES = {PATTERN: "serve", "LitServe": "litserve", "FastAPI, no Ray": "fastapi"}
BODY = b'{"inputs": [1.5]}'
NUM_CONNECTIONS = 16
START_TIMEOUT_S = 90.0
ENGINES = ("auto", "torch")
PARTS = ("requests", "bulk", "scaling")
# Replicas tell the edge every two seconds what they did.
REPORTED_S = 3.0


@dataclass(frozen=True, slots=True)
class Plan:
    """How long is measured."""

    num_rounds: int = 3
    seconds: float = 6.0
    num_sentences: int = 6000
    num_alone: int = 200
    num_beside: int = 200


QUICK = Plan(num_rounds=1, seconds=1.0, num_sentences=600, num_alone=20, num_beside=20)


def measure_scaling(plan: Plan, translator: Path) -> list[ScaledUp]:
    """Return how a second replica comes under load, per start of a server."""
    runs = []
    for number in range(plan.num_rounds):
        with serving(translator, "serve.autoscaling_config.max_replicas=2", "serve.engine=torch") as url:
            runs.append(scale_up(url, {"text": sentences(plan.num_sentences)}))
        shown = f"wanted after {runs[-1].decided_s:.1f} s, answers {runs[-1].answering_s:.1f} s later"
        print(f"round {number + 1}, a second replica: {shown}", file=sys.stderr, flush=True)
    return runs


def scale_up(url: str, body: Mapping[str, object]) -> ScaledUp:
    """Ask a server that has one replica for more than that can do, until a second one answers."""
    httpx.post(url + "/v1/translate", json={"text": sentences(64)}, timeout=600).raise_for_status()
    time.sleep(REPORTED_S)
    if count_answering(url) != 1:
        raise RuntimeError(f"{count_answering(url)} replicas answer before the load begins")
    with kept_busy(url + "/v1/translate", body, threading.Event()):
        begin = time.perf_counter()
        wait_until(lambda: wanted_replicas(url) > 1)
        decided = time.perf_counter()
        wait_until(lambda: count_answering(url) > 1)
        return ScaledUp(decided - begin, time.perf_counter() - decided)


def wanted_replicas(url: str) -> int:
    """Return how many replicas autoscaling wants."""
    (model,) = httpx.get(url + "/v1/models", timeout=60).raise_for_status().json()["models"]
    decision = model["replicas"]["autoscaling"]
    return 0 if decision is None else int(decision["wanted_replicas"])


def count_answering(url: str) -> int:
    """Return how many replicas say that they have answered."""
    families = text_string_to_metric_families(httpx.get(url + "/metrics", timeout=60).raise_for_status().text)
    return sum(
        sample.name == "eagleray_batch_items_count" and sample.value > 0 and "model" in sample.labels
        for family in families
        for sample in family.samples
    )


def wait_until(holds: Callable[[], bool]) -> None:
    """Ask ten times a second until something holds."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"no second replica within {START_TIMEOUT_S:g} s")
        time.sleep(0.1)


@contextmanager
def kept_busy(route: str, body: Mapping[str, object], stop: threading.Event) -> Iterator[None]:
    """Ask for large requests, one after the other."""

    def ask_on() -> None:
        while not stop.is_set():
            httpx.post(route, json=body, timeout=900).raise_for_status()

    asking = threading.Thread(target=ask_on)
    asking.start()
    try:
        yield
    finally:
        stop.set()
        asking.join()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(side: str, noop: Path) -> Iterator[str]:
    """Start a side alone; give the URL of its model."""
    if side == OURS:
        with serving(noop, "serve.num_replicas=1") as url:
            yield url + "/v1/predict"
        return
    port = free_port()
    words = [sys.executable, str(PEERS), PEER_NAMES[side], str(port)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, env=environment, text=True, start_new_session=True)
    assert process.stdout is not None
    try:
        watch = threading.Timer(START_TIMEOUT_S, process.kill)
        watch.start()
        for line in process.stdout:
            if line.strip() == "ready":
                break
        else:
            raise RuntimeError(f"{side} did not start")
        watch.cancel()
        yield f"http://127.0.0.1:{port}/v1/predict"
    finally:
        end_group(process)


def end_group(process: subprocess.Popen[str]) -> None:
    """End a peer and what it started: its own session, nobody else's."""
    process.terminate()
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


def ask(url: str) -> httpx.Response:
    """Ask for the no-op once."""
    return httpx.post(url, content=BODY, headers={"content-type": "application/json"}, timeout=START_TIMEOUT_S)


def require_right(side: str, answered: httpx.Response) -> None:
    """Refuse a no-op that is not one: what fails is not to be timed, and a failed item comes as a 200."""
    if answered.status_code != 200 or answered.json()["predictions"] != [{"value": 1.5}]:
        raise RuntimeError(f"{side} answers {answered.status_code} {answered.text[:300]}")


def measure_requests(plan: Plan, noop: Path) -> dict[str, list[tuple[Loaded, Loaded]]]:
    """Return of each side, per round, the load of 16 connections and of one."""
    sides = [side for side in SIDES if side != "LitServe" or find_spec("litserve") is not None]
    runs: dict[str, list[tuple[Loaded, Loaded]]] = {side: [] for side in sides}
    for number in range(plan.num_rounds):
        turn = number % len(sides)
        for side in (*sides[turn:], *sides[:turn]):
            with started(side, noop) as url:
                require_right(side, ask(url))
                load(url, BODY, num_connections=NUM_CONNECTIONS, seconds=min(2.0, plan.seconds))
                many = load(url, BODY, num_connections=NUM_CONNECTIONS, seconds=plan.seconds)
                one = load(url, BODY, num_connections=1, seconds=plan.seconds / 2)
            runs[side].append((many, one))
            shown = f"{many.requests_per_s:,.0f} requests/s, one at rest {one.p50_ms:.2f} ms"
            print(f"round {number + 1}, {side}: {shown}", file=sys.stderr, flush=True)
    return runs


def measure_bulk(plan: Plan, translator: Path) -> dict[Replicas, list[BulkRun]]:
    """Return what replicas do with a large request, and with small ones beside it, per round."""
    sides = [Replicas(engine, count) for engine in ENGINES for count in (1, 2)]
    runs: dict[Replicas, list[BulkRun]] = {side: [] for side in sides}
    for number in range(plan.num_rounds):
        for side in sides if number % 2 == 0 else reversed(sides):
            with serving(translator, f"serve.num_replicas={side.count}", f"serve.engine={side.engine}") as url:
                run = measure_replicas(plan, url + "/v1/translate")
            runs[side].append(run)
            shown = f"{side.name}: {run.sentences_per_s:,.0f} sentences/s"
            print(f"round {number + 1}, {shown}", file=sys.stderr, flush=True)
    return runs


def measure_replicas(plan: Plan, route: str) -> BulkRun:
    """Return what the replicas of a running server do."""
    body = {"text": sentences(plan.num_sentences)}
    httpx.post(route, json={"text": sentences(300)}, timeout=600).raise_for_status()
    at_rest = interactive(route, plan.num_alone, threading.Event())
    begin = time.perf_counter()
    whole = httpx.post(route, json=body, timeout=900)
    seconds = time.perf_counter() - begin
    require_whole(whole, plan.num_sentences)
    batch_s = one_batch(route)
    return BulkRun(
        plan.num_sentences / seconds, at_rest, beside_bulk(route, body, plan.num_beside), batch_s * 1000
    )


def require_whole(answer: httpx.Response, num_sentences: int) -> None:
    """Refuse an answer that lacks items or has failed ones."""
    answer.raise_for_status()
    items = answer.json()["translations"]
    failed = [item for item in items if isinstance(item, dict) and "error" in item]
    if len(items) != num_sentences or failed:
        raise RuntimeError(f"{len(items)} of {num_sentences} items, {len(failed)} failed: {failed[:1]}")


def interactive(route: str, count: int, stop: threading.Event) -> list[float]:
    """Ask for one sentence after the other; return the milliseconds of each."""
    taken = []
    with httpx.Client(timeout=60) as client:
        for text in sentences(count):
            begin = time.perf_counter()
            client.post(route, json={"text": text}).raise_for_status()
            taken.append((time.perf_counter() - begin) * 1000)
            if stop.wait(0.02):
                break
    return taken


def one_batch(route: str) -> float:
    """Return the seconds of a full batch, the best of three."""
    body = {"text": sentences(64)}
    taken = []
    for _ in range(3):
        begin = time.perf_counter()
        httpx.post(route, json=body, timeout=60).raise_for_status()
        taken.append(time.perf_counter() - begin)
    return min(taken)


def beside_bulk(route: str, body: Mapping[str, object], count: int) -> list[float]:
    """Return the milliseconds of small requests while large ones run, one after the other."""
    stop = threading.Event()
    with kept_busy(route, body, stop):
        time.sleep(0.5)
        return interactive(route, count, stop)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=PARTS, nargs="*", help="all by default")
    parser.add_argument("--quick", action="store_true", help="one round of a second: a smoke run, no measurement")
    parser.add_argument("--rounds", type=int, help="rounds of all sides")
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace the sections of this document")
    options = parser.parse_args()
    plan = QUICK if options.quick else Plan()
    plan = replace(plan, num_rounds=options.rounds or plan.num_rounds)
    machine = describe_machine()
    with tempfile.TemporaryDirectory(prefix="er-bench-", dir="/tmp") as folder:
        parts = options.what or PARTS
        if "requests" in parts:
            runs = measure_requests(plan, commit(noop_file(), Path(folder)))
            peers = [f"litserve {version('litserve')}"] if "LitServe" in runs else []
            text = report_requests(
                runs, plan.num_rounds, plan.seconds, "; ".join([machine, *peers]), client_name()
            )
            show(text, "serving", options.write)
        translator = commit(translation_file(ray_actor_options={"num_cpus": 1}), Path(folder))
        if "bulk" in parts:
            show(report_bulk(measure_bulk(plan, translator), plan.num_sentences, machine), "bulk", options.write)
        if "scaling" in parts:
            show(report_scaling(measure_scaling(plan, translator), machine), "scaling", options.write)


def show(text: str, section: str, path: Path | None) -> None:
    """Print a table, and put it in its place."""
    print(text + "\n", flush=True)
    if path is not None:
        write_section(path, section, text)


if __name__ == "__main__":
    main()
