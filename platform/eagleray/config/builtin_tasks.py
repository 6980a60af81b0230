"""The tasks that the file knows by a word, and what can be said of them without importing them, and torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Route = Literal["translate", "classify", "predict"]


@dataclass(frozen=True, slots=True)
class BuiltinTask:
    """A built-in task, from outside; a user's own is asked itself.

    Attributes:
        path: Its class, as `package.module:Class`.
        route: The verb that it answers to over HTTP.
        input_columns: Columns that an item to be answered must have.
    """

    path: str
    route: Route
    input_columns: tuple[str, ...]


BUILTIN_TASKS = {
    "translation": BuiltinTask("eagleray.tasks.translation:TranslationTask", "translate", ("source",)),
    "text-classification": BuiltinTask(
        "eagleray.tasks.text_classification:TextClassificationTask", "classify", ("text",)
    ),
    "image-classification": BuiltinTask(
        "eagleray.tasks.image_classification:ImageClassificationTask", "classify", ("image",)
    ),
}
