"""Versions as plain Hugging Face directories, and back."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import IMAGES, PAIRS, ROWS, save_distilbert, save_t5, save_vit, tiny_config, tiny_parts

from eagleray.config.layout import Layout
from eagleray.config.schema import RunConfig
from eagleray.engine import load_engine
from eagleray.errors import CheckpointDamagedError, ConfigError, UsageError
from eagleray.models import model_files
from eagleray.store.claim import RunClaim, claim_run
from eagleray.store.decide import Outcome
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.store.saver import CheckpointSaver
from eagleray_jobs.export import export_model
from eagleray_jobs.import_model import import_model

AUTO = {
    "translation": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
SCORES = {"loss": 0.5, "accuracy": 0.9, "accuracy/unit": 0.75}


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(ObjectStore.open(str(tmp_path / "store")))


def commit(registry: Registry, config: RunConfig) -> str:
    _, processor, model = tiny_parts(config)
    claim = claim_run(registry.store, config, notify=print)
    assert isinstance(claim, RunClaim)
    with claim:
        saver = CheckpointSaver(None, claim.handle, layout=Layout(), config=config)
        stored = model.state_dict().keys()
        named = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        tensors = {f"model.{name}": tensor.detach() for name, tensor in named.items() if name in stored}
        files = model_files(model, config, processor)
        saver.save(step=10, tensors=tensors, files=files, state={"step": 10}, metrics=SCORES)
        (result,) = saver.wait()
        saver.close()
        claim.finish(Outcome.FINISHED, {})
    assert result.ref is not None, result.error
    return result.ref


@pytest.mark.parametrize("task", AUTO)
def test_hugging_face_opens_an_export_with_the_logits_of_the_engine(
    task: str, registry: Registry, tmp_path: Path
) -> None:
    import transformers

    ref = commit(registry, tiny_config(task))
    report = export_model(registry, "tiny", tmp_path / "out")
    assert report.ref == ref
    assert {"config.json", "model.safetensors", "README.md"} <= set(report.files)
    assert report.size_bytes == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())

    engine = load_engine(registry.open(ref))
    rows = [engine.task.encode(row, engine.processor).features for row in ROWS[task]]
    inputs: dict[str, Any] = engine.task.collate(rows, engine.processor)
    inputs.pop("labels")
    theirs, info = getattr(transformers, AUTO[task]).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(theirs.eval()(**inputs).logits, engine.model(**inputs).logits)


@pytest.mark.parametrize("task", AUTO)
def test_the_code_of_the_model_card_gives_the_answer_of_the_engine(
    task: str, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from eagleray.tasks.image_classification import read_image_bytes

    ref = commit(registry, tiny_config(task))
    export_model(registry, ref, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    (tmp_path / "out" / "image.png").write_bytes(read_image_bytes(IMAGES[0]["image"]))
    monkeypatch.chdir(tmp_path / "out")
    names: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), names)
    engine = load_engine(registry.open(ref))
    item = {"source": "one hour", "text": "one hour", "image": IMAGES[0]["image"]}
    answer: Any = engine.answer([item])[0]
    assert names["answer"] == answer["text" if task == "translation" else "label"]


def test_a_model_card_names_data_scores_layout_and_versions(registry: Registry, tmp_path: Path) -> None:
    config = tiny_config("text-classification", data={"source": "cldr-langid", "max_source_length": 32})
    commit(registry, config)
    export_model(registry, "tiny", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for text in (
        "pipeline_tag: text-classification",
        "tiny@r1-step-00000010",
        "| bundled source | cldr-langid |",
        "was not tried on general text",
        "| accuracy | 0.9 |",
        "| accuracy | unit | 0.75 |",
        "| layout | ",
        f"| torch | {torch.__version__} |",
    ):
        assert text in card, text


def test_an_export_appears_whole_or_not_at_all(registry: Registry, tmp_path: Path) -> None:
    commit(registry, tiny_config())
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("keep me")
    with pytest.raises(UsageError, match="exists and is not an empty directory"):
        export_model(registry, "tiny", full)
    assert [path.name for path in full.iterdir()] == ["mine.txt"]
    for path in (tmp_path / "store").rglob("*.safetensors"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    with pytest.raises(CheckpointDamagedError):
        export_model(registry, "tiny", tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"store", "full"}


@pytest.mark.parametrize("task", AUTO)
def test_an_export_that_is_imported_answers_the_same(task: str, registry: Registry, tmp_path: Path) -> None:
    ref = commit(registry, tiny_config(task, name="first"))
    export_model(registry, ref, tmp_path / "out")
    imported = import_model(registry.store, tmp_path / "out", "second")
    shutil.rmtree(tmp_path / "out")
    assert imported == "second@r1-step-00000000"
    ours, theirs = load_engine(registry.open("second")), load_engine(registry.open("first"))
    items = [{column: row[column] for column in ours.task.input_columns} for row in ROWS[task]]
    assert ours.answer(items) == theirs.answer(items)
    assert ours.summary.source_lang == theirs.summary.source_lang
    assert ours.summary.labels == theirs.summary.labels


def test_hugging_face_directories_are_imported_and_served_without_training(
    registry: Registry, tmp_path: Path
) -> None:
    t5 = save_t5(tmp_path / "t5")
    ref = import_model(registry.store, t5, "t5", source_lang="en", target_lang="fr")
    engine = load_engine(registry.open(ref))
    assert engine.summary.task == "translation"
    assert isinstance(engine.answer([{"source": PAIRS[0]["source"]}], {"max_new_tokens": 3})[0], dict)
    import_model(registry.store, save_distilbert(tmp_path / "d", ["no", "yes"]), "d")
    assert load_engine(registry.open("d")).summary.labels == ("no", "yes")
    vit = save_vit(tmp_path / "v")
    (vit / "eagleray_processor.json").unlink()
    import_model(registry.store, vit, "v")
    assert load_engine(registry.open("v")).summary.labels == ("0", "1", "2")
    assert registry.names() == ["d", "t5", "v"]


def test_a_second_import_under_one_name_is_a_new_version(registry: Registry, tmp_path: Path) -> None:
    directory = save_distilbert(tmp_path / "d", ["no", "yes"])
    refs = [import_model(registry.store, directory, "d") for _ in range(2)]
    assert refs == ["d@r1-step-00000000", "d@r2-step-00000000"]


def test_what_cannot_be_imported_says_why_and_leaves_nothing(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a directory"):
        import_model(registry.store, tmp_path / "nowhere", "x")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"no config\.json"):
        import_model(registry.store, tmp_path / "empty", "x")
    with pytest.raises(ConfigError, match="only weights in safetensors"):
        import_model(registry.store, save_t5(tmp_path / "pickled", safe=False), "x")
    directory = save_distilbert(tmp_path / "d", ["no", "yes"])
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["DistilBertForMaskedLM"]}))
    with pytest.raises(UsageError, match="names DistilBertForMaskedLM, which is no model of a built-in task"):
        import_model(registry.store, directory, "x")
    config["n_layers"] = 2
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"lacks the weights distilbert\.transformer\.layer\.1"):
        import_model(registry.store, directory, "x")
    assert registry.names() == []
    assert not list((tmp_path / "store").rglob("run.json"))
