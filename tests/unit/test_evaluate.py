from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_checkpoint import FakeCheckpoint, tiny_checkpoint
from tiny_models import IMAGES, PAIRS, TEXTS

from eagleray.config.schema import RunConfig
from eagleray.engine import load_engine
from eagleray.errors import DataError
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray.tasks.image_classification import read_image_bytes
from eagleray_jobs.baselines import NgramClassifier
from eagleray_jobs.evaluate import evaluate, keep_report
from eagleray_jobs.pool import run_in_line

ROWS = {"translation": PAIRS, "text-classification": TEXTS, "image-classification": IMAGES}


def with_files(checkpoint: FakeCheckpoint, folder: Path) -> RunConfig:
    """Write the rows twice: as training and as test files."""
    config = checkpoint.config()
    for name in ("train", "test"):
        lines = [json.dumps({**row, "n": i}) for i, row in enumerate(ROWS[config.task])]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    data = config.data.model_copy(
        update={"train": str(folder / "train.jsonl"), "test": str(folder / "test.jsonl"), "source": None}
    )
    return config.model_copy(update={"data": data})


@pytest.mark.parametrize("task_name", ROWS)
def test_the_scores_are_those_of_the_task_on_the_answers_of_the_engine(task_name: str, tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint(task_name)
    config = with_files(checkpoint, tmp_path)
    report = evaluate(config, checkpoint.ref, lambda: load_engine(checkpoint), run_in_line)
    answers = load_engine(checkpoint).answer(ROWS[task_name])
    assert report.scores == load_task(config).score(answers, ROWS[task_name])  # type: ignore[arg-type]
    assert report.num_examples == len(ROWS[task_name]) and report.num_failed == 0
    kinds = {row["kind"] for row in ROWS[task_name] if "kind" in row}
    assert {name.split("/")[1] for name in report.scores if "/" in name} == kinds


def test_images_are_scored_from_the_files_that_rows_name_and_from_the_bundled_digits(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint("image-classification")
    for number, row in enumerate(IMAGES):
        (tmp_path / f"{number}.png").write_bytes(read_image_bytes(row["image"]))
    rows = [{"image": f"{number}.png", "label": row["label"]} for number, row in enumerate(IMAGES)]
    (tmp_path / "named.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = with_files(checkpoint, tmp_path)
    scores = []
    for test in ("test.jsonl", "named.jsonl"):
        data = config.data.model_copy(update={"test": str(tmp_path / test)})
        changed = config.model_copy(update={"data": data})
        scores.append(evaluate(changed, checkpoint.ref, lambda: load_engine(checkpoint), run_in_line).scores)
    assert scores[0] == scores[1]

    digits = config.data.model_copy(update={"source": "digits", "train": None, "test": None, "test_split": 0.02})
    config = config.model_copy(update={"data": digits})
    report = evaluate(config, checkpoint.ref, lambda: load_engine(checkpoint), run_in_line)
    assert report.num_examples > 20 and report.num_failed == 0 and "accuracy/digit" in report.scores


def test_copying_the_input_is_the_baseline_of_a_translation(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint("translation")
    report = evaluate(
        with_files(checkpoint, tmp_path), checkpoint.ref, lambda: load_engine(checkpoint), run_in_line
    )
    assert report.baselines["copy the input"]["exact_match"] == 1 / len(PAIRS)  # France
    assert "bleu" in report.signatures
    headers, lines = report.rows()
    assert headers[:2] == ["kind", "exact_match"] and [line[0] for line in lines] == ["all", "date", "unit"]
    assert "(0.200)" in lines[0][1]


def test_character_ngrams_are_the_baseline_of_a_text_classification(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint("text-classification")
    report = evaluate(
        with_files(checkpoint, tmp_path), checkpoint.ref, lambda: load_engine(checkpoint), run_in_line
    )
    assert report.baselines["character n-grams"]["accuracy"] == 1.0  # it saw the test rows


def test_the_ngram_classifier_tells_languages_apart() -> None:
    classifier = NgramClassifier()
    classifier.fit([("the house of the king", "en"), ("la maison du roi", "fr"), ("das Haus des Königs", "de")])
    assert [classifier.predict(text) for text in ("the kings", "les maisons", "die Häuser")] == ["en", "fr", "de"]


def test_a_split_without_examples_is_named(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint("translation")
    config = with_files(checkpoint, tmp_path)
    data = config.data.model_copy(update={"validation_split": 0.0})
    with pytest.raises(DataError, match="holds no validation example"):
        evaluate(
            config.model_copy(update={"data": data}),
            checkpoint.ref,
            lambda: load_engine(checkpoint),
            run_in_line,
            split="validation",
        )


def test_a_bad_row_stops_with_its_place(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint("translation")
    config = with_files(checkpoint, tmp_path)
    (tmp_path / "test.jsonl").write_text('{"source": "x", "target": "y"}\n{')
    with pytest.raises(DataError, match=r"test\.jsonl:2: is not valid JSON"):
        evaluate(config, checkpoint.ref, lambda: load_engine(checkpoint), run_in_line)


def test_the_report_is_kept_next_to_the_run(tmp_path: Path) -> None:
    checkpoint, _ = tiny_checkpoint("translation")
    report = evaluate(
        with_files(checkpoint, tmp_path), checkpoint.ref, lambda: load_engine(checkpoint), run_in_line
    )
    store = ObjectStore.open(str(tmp_path / "store"))
    key = keep_report(store, report)
    name = checkpoint.ref.partition("@")[0]
    assert key.startswith(f"runs/{name}/r1/evaluations/r1-step-00000010-test-")
    assert json.loads(store.get(key))["scores"] == report.scores
