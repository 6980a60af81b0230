"""What `eagleray validate` says about a file."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eagleray.config.loader import LoadedFile
from eagleray.config.summary import summarize

FILE = """
name: en-fr
task: translation
store: ./store
model: {family: marian}
data: {source: cldr-en-fr}
"""


@pytest.mark.parametrize(
    "override, shown",
    [
        ("serve.num_replicas=2", "en-fr@best, 2 replicas"),
        ("serve.ref='@production'", "en-fr@production, 1 to 4 replicas"),
        ("serve.follow=latest", "en-fr@latest, followed, 1 to 4 replicas"),
    ],
)
def test_what_is_served_is_shown(load: Callable[..., LoadedFile], override: str, shown: str) -> None:
    assert summarize(load(FILE, [override])).splitlines()[-1].split(maxsplit=1) == ["serve", shown]
