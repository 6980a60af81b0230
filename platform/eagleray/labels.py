"""The class names of a classifier, as a file of its checkpoint; whoever only shows them does without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

_SETTINGS_FILE = "eagleray_processor.json"


def labels_file(labels: Sequence[str]) -> dict[str, bytes]:
    """Return the file that holds the class names."""
    return {_SETTINGS_FILE: json.dumps({"labels": list(labels)}, indent=2, ensure_ascii=False).encode()}


def read_labels(files: Mapping[str, bytes]) -> tuple[str, ...]:
    """Read the class names back."""
    return tuple(json.loads(files[_SETTINGS_FILE])["labels"])
