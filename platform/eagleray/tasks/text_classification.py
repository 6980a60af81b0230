"""Text classification: one label of a fixed set for a text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from torch import nn

from eagleray.hub import locate_pretrained
from eagleray.labels import labels_file, read_labels
from eagleray.tasks import rows
from eagleray.tasks.base import Batch, Encoded, Example, Features, Head, Processor
from eagleray.tasks.classification import ClassificationTask, pretrained_labels
from eagleray.tasks.tokenizer import load_tokenizer, save_to_files, tokenise, train_classifier_tokenizer


class TextClassificationProcessor(Processor):
    """A tokenizer and the class names."""

    def __init__(self, tokenizer: Any, labels: Sequence[str]) -> None:
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.pad_token_id = int(tokenizer.pad_token_id)

    def files(self) -> dict[str, bytes]:
        """Return the tokenizer's files and ours."""
        return {**save_to_files(self.tokenizer.save_pretrained), **labels_file(self.labels)}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> TextClassificationProcessor:
        """Rebuild the processor from the files of a checkpoint."""
        return cls(load_tokenizer(files), read_labels(files))


class TextClassificationTask(ClassificationTask):
    """Give `text` its `label`."""

    columns: ClassVar[tuple[str, ...]] = ("text", "label")
    input_columns: ClassVar[tuple[str, ...]] = ("text",)
    head: ClassVar[Head | None] = "sequence-classification"

    def build_processor(self, examples: Iterable[Example]) -> TextClassificationProcessor:
        """Collect the labels, and take the pretrained model's tokenizer or train one."""
        data, model = self.config.data, self.config.model
        if model.pretrained is not None:
            return pretrained_processor(self.config, examples)
        labels: dict[str, None] = {}
        tokenizer = train_classifier_tokenizer(
            (_see(example, labels) for example in examples), model.tokenizer, data.max_source_length
        )
        found = ({"label": label} for label in labels)
        return TextClassificationProcessor(tokenizer, rows.collect_labels(data.labels, found))

    def load_processor(self, files: Mapping[str, bytes]) -> TextClassificationProcessor:
        """Rebuild the processor from the files of a checkpoint."""
        return TextClassificationProcessor.from_files(files)

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        """Tokenise the text.

        Raises:
            DataError: The text is missing, empty or no text, or the label is unknown.
        """
        assert isinstance(processor, TextClassificationProcessor)
        text = rows.read_text(example, "text")
        ids, truncated = tokenise(processor.tokenizer, text, self.config.data.max_source_length)
        features: Features = {"input_ids": ids}
        if not answer:
            features["label"] = rows.label_number(example, processor.labels)
        return Encoded(features, len(ids), truncated)

    def collate(self, rows_: Sequence[Features], processor: Processor) -> Batch:
        """Pad to the longest text, shapes (B, S) and (B,)."""
        assert isinstance(processor, TextClassificationProcessor)
        texts = [row["input_ids"] for row in rows_]
        batch = {"input_ids": rows.pad(texts, processor.pad_token_id), "attention_mask": rows.mask(texts)}
        return batch | self.collate_labels(rows_)

    def logits(self, model: nn.Module, batch: Batch) -> Any:
        """Return the scores of the classes, shape (B, classes)."""
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits

    def max_length(self, processor: Processor) -> int:
        """Return the longest text, in tokens."""
        return self.config.data.max_source_length


def pretrained_processor(config: Any, examples: Iterable[Example]) -> TextClassificationProcessor:
    """Open the tokenizer of `model.pretrained`, with its labels where they cover the data's."""
    from transformers import AutoTokenizer

    directory = locate_pretrained(config.model)
    tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    return TextClassificationProcessor(tokenizer, pretrained_labels(directory, config.data.labels, examples))


def _see(example: Example, labels: dict[str, None]) -> str:
    """Return the text and note the label: the examples can be read only once."""
    labels.setdefault(rows.read_label(example))
    return rows.read_text(example, "text")
