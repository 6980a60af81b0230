"""Tasks: rows to tensors, losses, answers, scores."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import IMAGES, PAIRS, ROWS, TEXTS, tiny_config, tiny_parts
from torch.nn import functional as F

from eagleray.config.builtin_tasks import BUILTIN_TASKS
from eagleray.errors import ConfigError, DataError
from eagleray.tasks import Task, load_task, task_class
from eagleray.tasks.base import move
from eagleray.tasks.rows import IGNORED

TASKS = list(ROWS)


def encode_all(task: Task, processor: Any, rows: Any) -> list[dict[str, Any]]:
    return [task.encode(row, processor).features for row in rows]


@pytest.mark.parametrize("name", TASKS)
def test_a_batch_has_the_loss_of_its_rows_alone(name: str) -> None:
    task, processor, model = tiny_parts(tiny_config(name))
    rows = encode_all(task, processor, ROWS[name])
    together = task.loss(model, task.collate(rows, processor))
    alone = [task.loss(model, task.collate([row], processor)) for row in rows]
    assert int(together.count) == sum(int(loss.count) for loss in alone)
    assert together.total.item() == pytest.approx(sum(loss.total.item() for loss in alone), rel=1e-6)


@pytest.mark.parametrize("name", ["translation", "text-classification"])
def test_more_padding_changes_neither_loss_nor_gradients(name: str) -> None:
    task, processor, model = tiny_parts(tiny_config(name))
    batch = task.collate(encode_all(task, processor, ROWS[name]), processor)
    fill = {"attention_mask": 0, "labels": IGNORED}
    padded = {
        key: F.pad(value, (0, 5), value=fill.get(key, processor.pad_token_id)) if value.dim() == 2 else value  # type: ignore[attr-defined]
        for key, value in batch.items()
    }

    def run(batch: dict[str, torch.Tensor]) -> tuple[float, dict[str, torch.Tensor]]:
        model.zero_grad()
        loss = task.loss(model, batch)
        loss.total.backward()
        return loss.total.item(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    loss, gradients = run(batch)
    padded_loss, padded_gradients = run(padded)
    assert padded_loss == pytest.approx(loss, rel=1e-6)
    for key, gradient in gradients.items():
        torch.testing.assert_close(padded_gradients[key], gradient, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_label_smoothing_is_the_formula_of_the_paper(name: str) -> None:
    smooth = tiny_config(name, train={"max_steps": 1, "label_smoothing_factor": 0.2})
    task, processor, model = tiny_parts(smooth)
    batch = task.collate(encode_all(task, processor, ROWS[name]), processor)
    with torch.no_grad():
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        log_p = model(**inputs).logits.log_softmax(-1)
        total = task.loss(model, batch).total.item()
    expected = 0.0
    num_classes = log_p.shape[-1]
    for row, label in zip(log_p.reshape(-1, num_classes), batch["labels"].flatten().tolist(), strict=True):
        if label != IGNORED:
            expected -= 0.8 * float(row[label]) + 0.2 * float(row.sum()) / num_classes
    assert total == pytest.approx(expected, rel=1e-5)


def test_the_count_of_a_translation_is_its_target_tokens() -> None:
    task, processor, model = tiny_parts(tiny_config())
    rows = encode_all(task, processor, PAIRS)
    assert int(task.loss(model, task.collate(rows, processor)).count) == sum(len(row["labels"]) for row in rows)


def test_a_target_ends_and_its_decoder_inputs_begin_as_marian_expects() -> None:
    from transformers.models.marian.modeling_marian import shift_tokens_right

    task, processor, model = tiny_parts(tiny_config())
    batch = task.collate(encode_all(task, processor, PAIRS), processor)
    config: Any = model.config
    shifted = shift_tokens_right(batch["labels"], config.pad_token_id, config.decoder_start_token_id)
    # Past the end of a target transformers leaves what it shifted; only positions with a label count.
    counted = batch["labels"] != IGNORED
    assert torch.equal(batch["decoder_input_ids"][counted], shifted[counted])
    last = counted.sum(1) - 1
    assert (batch["labels"][torch.arange(len(PAIRS)), last] == config.eos_token_id).all()


@pytest.mark.parametrize("name", ["translation", "text-classification"])
def test_hugging_face_opens_the_tokenizer_and_it_says_the_same(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    _, processor, _ = tiny_parts(tiny_config(name))
    for file, data in processor.files().items():
        (tmp_path / file).write_bytes(data)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    for text in ("two hours", "1 234,5\u202f%  \u00e9\u4e00 .", " a\n b"):
        ids = tokenizer(text).input_ids
        assert ids == processor.tokenizer(text).input_ids  # type: ignore[attr-defined]
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_training_a_tokenizer_depends_neither_on_chance_nor_on_the_order_of_the_rows() -> None:
    task = load_task(tiny_config())
    files = [task.build_processor(iter(rows)).files() for rows in (PAIRS, PAIRS, PAIRS[::-1]) for _ in range(3)]
    assert all(other == files[0] for other in files)


def test_a_vocabulary_is_as_large_as_asked_where_the_data_allows() -> None:
    _, processor, model = tiny_parts(tiny_config())
    tokenizer: Any = processor.tokenizer  # type: ignore[attr-defined]
    assert len(tokenizer) == 280
    assert model.get_input_embeddings().num_embeddings == 280  # type: ignore[operator]


def test_lower_casing_is_part_of_the_tokenizer() -> None:
    model = {"family": "bert", "tokenizer": {"lowercase": True, "vocab_size": 270}}
    processor: Any = load_task(tiny_config("text-classification", model=model)).build_processor(iter(TEXTS))
    assert processor.tokenizer("ONE Hour").input_ids == processor.tokenizer("one hour").input_ids


@pytest.mark.parametrize("name", TASKS)
def test_a_processor_rebuilt_from_its_files_encodes_and_collates_the_same(name: str) -> None:
    task, processor, _ = tiny_parts(tiny_config(name))
    rebuilt = task.load_processor(processor.files())
    assert rebuilt.labels == processor.labels
    rows = encode_all(task, rebuilt, ROWS[name])
    assert rows == encode_all(task, processor, ROWS[name])
    ours, theirs = task.collate(rows, rebuilt), task.collate(rows, processor)
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


def test_a_long_text_is_cut_and_keeps_its_end_token() -> None:
    task, processor, _ = tiny_parts(tiny_config())
    long = task.encode({"source": "one hour " * 50, "target": "une"}, processor)
    short = task.encode(PAIRS[0], processor)
    assert long.truncated and not short.truncated
    assert len(long.features["input_ids"]) == long.length == 32
    assert long.features["input_ids"][-1] == short.features["input_ids"][-1]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"target": "x"}, "column 'source' is missing; the row has 'target'"),
        ({"source": 3, "target": "x"}, "column 'source' holds a value of type int, text was expected"),
        ({"source": "  ", "target": "x"}, "column 'source' is empty"),
        ({"source": None, "target": "x"}, "column 'source' is empty"),
        ({"source": "a\ud800", "target": "x"}, "column 'source' is not valid Unicode at character 1"),
        ({"source": "x", "target": ["y"]}, "column 'target' holds"),
    ],
)
def test_a_row_that_cannot_be_used_says_which_column_and_what_it_holds(row: dict[str, Any], message: str) -> None:
    task, processor, _ = tiny_parts(tiny_config())
    with pytest.raises(DataError, match=message):
        task.encode(row, processor)


def test_labels_are_words_sorted_or_numbers_in_order() -> None:
    from eagleray.tasks.rows import collect_labels, label_number

    assert collect_labels(None, [{"label": "b"}, {"label": "a"}, {"label": "b"}]) == ("a", "b")
    assert collect_labels(None, [{"label": 10}, {"label": 9}, {"label": 2.0}]) == ("2", "9", "10")
    assert collect_labels(["z", "a"], []) == ("z", "a")
    assert label_number({"label": 1}, ("cat", "dog")) == 1
    assert label_number({"label": 10}, ("9", "10")) == 1
    with pytest.raises(DataError, match="label 'cow' is none of the 2 classes"):
        label_number({"label": "cow"}, ("cat", "dog"))
    with pytest.raises(DataError, match=r"hold 1 class\(es\): a"):
        collect_labels(None, [{"label": "a"}])
    with pytest.raises(ConfigError, match="names a more than once"):
        collect_labels(["a", "b", "a"], [])


def test_an_image_may_come_as_bytes_path_array_or_mapping(tmp_path: Path) -> None:
    from PIL import Image

    task, processor, _ = tiny_parts(tiny_config("image-classification"))
    array = np.array(IMAGES[0]["image"], dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(array).save(path)
    forms = [path.read_bytes(), str(path), array, IMAGES[0]["image"], {"bytes": path.read_bytes(), "path": None}]
    rows = [task.encode({"image": form}, processor, answer=True).features for form in forms]
    pixels = task.collate(rows, processor)["pixel_values"]
    assert pixels.shape == (5, 1, 8, 8)
    assert torch.equal(pixels, pixels[:1].expand_as(pixels))
    assert torch.allclose(pixels[0, 0], torch.tensor(array / 255 * 2 - 1, dtype=torch.float32), atol=1e-6)


@pytest.mark.parametrize("value", [b"no image", "/does/not/exist.png", 3, [[300]], [["a"]], {"bytes": None}])
def test_what_is_no_image_is_a_data_error(value: Any) -> None:
    task, processor, _ = tiny_parts(tiny_config("image-classification"))
    with pytest.raises(DataError, match="column 'image'"):
        task.encode({"image": value}, processor, answer=True)


def test_an_image_that_would_unpack_to_gigabytes_is_refused() -> None:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, format="PNG")
    task, processor, _ = tiny_parts(tiny_config("image-classification"))
    with pytest.raises(DataError, match="9000 x 9000 pixels are more than 50,000,000"):
        task.encode({"image": buffer.getvalue()}, processor, answer=True)


@pytest.mark.parametrize("name", TASKS)
def test_answers_come_one_per_row_and_fit_json(name: str) -> None:
    task, processor, model = tiny_parts(tiny_config(name))
    rows = [task.encode(row, processor, answer=True).features for row in ROWS[name]]
    answers = task.predict(model.eval(), task.collate(rows, processor), processor, {"max_new_tokens": 3})
    assert len(answers) == len(rows)
    json.dumps(answers)
    if task.route == "classify":
        assert all(sum(answer["scores"].values()) == pytest.approx(1) for answer in answers)
        assert all(answer["scores"][answer["label"]] == answer["score"] for answer in answers)


def test_translations_are_scored_also_per_kind() -> None:
    task = load_task(tiny_config())
    answers = [{"text": row["target"]} for row in PAIRS]
    answers[1] = {"text": "wrong"}
    scores = task.score(answers, PAIRS)
    assert scores["exact_match"] == 0.8
    assert scores["exact_match/date"] == 1.0
    assert scores["exact_match/unit"] == 0.5
    assert 0 < scores["bleu"] < 100 and 0 < scores["chrf"] < 100
    assert task.score_signatures()["bleu"].startswith("nrefs:1|")


def test_classes_are_scored_like_scikit_learn_does() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    task = load_task(tiny_config("text-classification"))
    truth = ["a", "a", "b", "c", "b", "a"]
    given = ["a", "b", "b", "d", "b", "c"]
    rows = [{"label": label, "kind": "odd" if i % 2 else "even"} for i, label in enumerate(truth)]
    scores = task.score([{"label": label} for label in given], rows)
    assert scores["accuracy"] == metrics.accuracy_score(truth, given)
    expected = metrics.f1_score(truth, given, average="macro", zero_division=0)
    assert scores["macro_f1"] == pytest.approx(expected)
    assert scores["accuracy/even"] == pytest.approx(1.0)
    assert scores["accuracy/odd"] == 0.0
    assert {"macro_f1/odd", "macro_f1/even"} <= scores.keys()


def test_an_own_task_is_found_by_its_import_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_task_module.py").write_text(
        "from eagleray.tasks import Task\n"
        "from eagleray.tasks.translation import TranslationTask\n"
        "class Mine(TranslationTask): ...\n"
        "class Unfinished(Task): ...\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert type(load_task(tiny_config(task="own_task_module:Mine", model={"family": "marian"}))).__name__ == "Mine"
    for path, message in [
        ("no_such_module:Mine", "cannot import no_such_module: ModuleNotFoundError"),
        ("own_task_module:Mien", "did you mean Mine?"),
        ("own_task_module:value", "is a int, not a subclass of eagleray.tasks.Task"),
        ("own_task_module:Unfinished", "does not implement build_processor, collate"),
    ]:
        with pytest.raises(ConfigError, match=message.replace("?", r"\?")):
            load_task(tiny_config(task=path, model={"family": "marian"}))


@pytest.mark.parametrize("name", BUILTIN_TASKS)
def test_what_is_said_of_a_built_in_task_without_importing_it_is_what_its_class_says(name: str) -> None:
    said, found = BUILTIN_TASKS[name], task_class(name)
    assert (said.route, said.input_columns) == (found.route, found.input_columns)


def test_a_batch_of_something_else_than_tensors_names_the_value() -> None:
    with pytest.raises(ConfigError, match="the task's collate returned labels as list"):
        move({"input_ids": torch.zeros(1), "labels": [1]}, torch.device("cpu"))  # type: ignore[dict-item]
