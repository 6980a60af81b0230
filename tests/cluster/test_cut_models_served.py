"""The shipped files of cut models, shortened: trained by four workers to the losses of en-fr.yaml, and served."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from ray_cluster import RayCluster
from serving_models import Command
from train_runs import CommandLine

from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry

CONFIGS = Path(__file__).parents[2] / "configs"
LAYOUTS = {"en-fr": "ddp2", "en-fr-hybrid": "fsdp2.tp2", "en-fr-pipeline": "pp2.ddp2"}
CUT = [name for name, layout in LAYOUTS.items() if "." in layout]
SHORTENED = (
    "train.max_steps=60",
    "train.warmup_steps=10",
    "train.eval_steps=60",
    "train.save_steps=60",
    "train.max_eval_examples=100",
    "resources.resources_per_worker={CPU: 0.5}",
)
TEXTS = ["6 July 2021", "three days", "Monday", "12 kilometres", "red, green, and blue"]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@dataclass(frozen=True)
class Trained:
    """What became of the three files.

    Attributes:
        store: Where their versions are.
        scores: Of each, at its end.
        stderr: What each showed on its way.
    """

    store: Path
    scores: dict[str, dict[str, float]]
    stderr: dict[str, str]


@pytest.fixture(scope="module")
def trained(
    ray_cluster: RayCluster, command_line: CommandLine, tmp_path_factory: pytest.TempPathFactory
) -> Trained:
    store = tmp_path_factory.mktemp("cut") / "store"
    found = Trained(store, {}, {})
    for name in LAYOUTS:
        call = ("train", CONFIGS / f"{name}.yaml", *SHORTENED, "--address", ray_cluster.address, "--store", store)
        done = command_line.run(*call)
        assert (done.status, done.value["ref"]) == (0, f"{name}@r1-step-00000060"), done.stderr
        found.scores[name], found.stderr[name] = done.value["scores"], done.stderr
    return found


@pytest.mark.parametrize("name", CUT)
def test_a_cut_model_is_trained_to_the_scores_of_a_whole_one(trained: Trained, name: str) -> None:
    manifest = Registry(ObjectStore.open(str(trained.store))).open(name).manifest
    assert (manifest.step, manifest.layout) == (60, LAYOUTS[name])
    assert trained.scores[name] == pytest.approx(trained.scores["en-fr"], abs=2e-3)


def test_the_cut_of_a_pipeline_is_shown_before_there_are_workers(trained: Trained) -> None:
    before, _, _ = trained.stderr["en-fr-pipeline"].partition("start workers")
    shown = [line.removeprefix("pipeline: ") for line in before.splitlines() if line.startswith("pipeline: ")]
    assert [line.partition(":")[0] for line in shown] == ["stage 0", "stage 1"]
    assert all("of the estimated cost" in line for line in shown)
    assert "encoder.layers.0" in shown[0] and "decoder.layers.1" in shown[1].replace("0 to 1", "1")


@pytest.fixture(scope="module")
def server(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Both cut models behind one front, from the files that trained them."""
    command = Command(tmp_path_factory.mktemp("server") / "home")
    files = [str(CONFIGS / f"{name}.yaml") for name in CUT]
    small = "serve.ray_actor_options={num_cpus: 0.25}"
    process, info = command.serve(*files, small, "serve.num_replicas=1", "--store", str(trained.store))
    yield info["url"]
    process.send_signal(signal.SIGINT)
    process.wait(60)
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("name", CUT)
def test_its_version_is_served_with_the_answers_of_transformers(
    trained: Trained, server: str, tmp_path: Path, name: str
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    from eagleray_jobs.export import export_model

    asked = {"text": TEXTS, "num_beams": 1, "max_new_tokens": 24}
    answer = httpx.post(f"{server}/v1/translate/{name}", json=asked, timeout=60).json()
    assert (answer["model"], answer["version"]) == (name, "r1-step-00000060")

    export_model(Registry(ObjectStore.open(str(trained.store))), name, tmp_path / "export")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "export").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "export")
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
    generated = model.generate(**batch, num_beams=1, max_new_tokens=24)
    expected = tokenizer.batch_decode(generated, skip_special_tokens=True)
    assert [each["text"] for each in answer["translations"]] == [text.strip() for text in expected]
