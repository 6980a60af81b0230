"""The README of an exported model. Text from values; opens nothing."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from eagleray.config.schema import DataConfig, RunConfig
from eagleray.store.checkpoint import Checkpoint

_TAGS = {
    "translation": "translation",
    "text-classification": "text-classification",
    "image-classification": "image-classification",
}
_SCOPE = {
    "cldr-en-fr": "It translates localised phrases of the Unicode CLDR (names, dates, units, amounts, lists); it "
    "is no translator of general text.",
    "cldr-langid": "It tells the languages of localised phrases of the Unicode CLDR apart; it was not tried on "
    "general text.",
    "digits": "It reads digits of 8 x 8 grey pixels (scikit-learn's bundled set).",
}
_USE = {
    "translation": """\
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

directory = "."
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSeq2SeqLM.from_pretrained(directory)
tokens = model.generate(**tokenizer({example}, return_tensors="pt"), max_new_tokens={length})
answer = tokenizer.decode(tokens[0], skip_special_tokens=True)
print(answer)""",
    "text-classification": """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

directory = "."
tokenizer = AutoTokenizer.from_pretrained(directory)
model = AutoModelForSequenceClassification.from_pretrained(directory)
logits = model(**tokenizer({example}, return_tensors="pt")).logits
answer = model.config.id2label[int(logits.argmax())]
print(answer)""",
    "image-classification": """\
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

directory = "."
processor = AutoImageProcessor.from_pretrained(directory)
model = AutoModelForImageClassification.from_pretrained(directory)
logits = model(**processor(Image.open("image.png").convert({mode}), return_tensors="pt")).logits
answer = model.config.id2label[int(logits.argmax())]
print(answer)""",
}


def model_card(checkpoint: Checkpoint) -> str:
    """Return the README.md of a version: what it is, its data, its scores, how it was made and how to open it."""
    config, manifest = checkpoint.config(), checkpoint.manifest
    sections = [
        _front_matter(config),
        f"# {config.name}",
        f"Version `{checkpoint.ref}`, committed {manifest.created} by [Eagleray](https://pypi.org/project/eagleray).",
        _SCOPE.get(config.data.source or "", ""),
        f"## Data\n\n{_table(('', ''), _describe_data(config.data))}",
        f"## Scores\n\n{_scores(manifest.metrics)}",
        f"## Training\n\n{_table(('', ''), _describe_training(config, manifest.layout, manifest.step))}",
        f"## Versions\n\n{_table(('package', 'version'), sorted(manifest.versions.items()))}",
        _usage(config, checkpoint),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(config: RunConfig) -> str:
    lines = ["library_name: transformers", "tags: [eagleray]"]
    if config.task in _TAGS:
        lines.append(f"pipeline_tag: {_TAGS[config.task]}")
    if config.task == "translation":
        lines.append(f"language: {json.dumps([config.data.source_lang, config.data.target_lang])}")
    return "\n".join(["---", *lines, "---"])


def _describe_data(data: DataConfig) -> list[tuple[str, str]]:
    rows = [("bundled source", data.source), ("training files", _name_files(data.train))]
    held_out = f"{data.validation_split:.0%} for validation, {data.test_split:.0%} for the test"
    rows += [
        ("validation files", _name_files(data.validation)),
        ("held out by key", held_out if data.source or data.train else None),
        ("longest input", f"{data.max_source_length} tokens"),
    ]
    return [(key, value) for key, value in rows if value]


def _name_files(files: object) -> str | None:
    return None if files is None else str(files)


def _scores(metrics: Mapping[str, float | None]) -> str:
    if not metrics:
        return "It was not evaluated."
    known = {name: "not finite" if value is None else f"{value:.4g}" for name, value in metrics.items()}
    whole = [(name, value) for name, value in sorted(known.items()) if "/" not in name]
    by_kind = [(*name.split("/", 1), value) for name, value in sorted(known.items()) if "/" in name]
    text = f"On the validation split:\n\n{_table(('score', 'value'), whole)}"
    return f"{text}\n\n{_table(('score', 'kind', 'value'), by_kind)}" if by_kind else text


def _describe_training(config: RunConfig, layout: str, step: int) -> list[tuple[str, str]]:
    model = config.model
    rows = [
        ("model", f"from scratch: {model.family}" if model.family else f"from {model.pretrained}"),
        ("step", str(step)),
        ("layout", layout),
    ]
    if train := config.train:
        keys = ("global_batch_size", "optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "seed")
        rows += [(key, f"{getattr(train, key)}") for key in keys]
    return rows


def _usage(config: RunConfig, checkpoint: Checkpoint) -> str:
    if config.task not in _USE:
        return ""
    values = {
        "example": json.dumps("one hour"),
        "length": config.data.max_target_length,
        "mode": json.dumps(_image_mode(checkpoint)),
    }
    return f"## Use\n\n```python\n{_USE[config.task].format(**values)}\n```"


def _image_mode(checkpoint: Checkpoint) -> str:
    described = json.loads(checkpoint.files().get("preprocessor_config.json", b"{}"))
    return "L" if len(described.get("image_mean") or (0, 0, 0)) == 1 else "RGB"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)
