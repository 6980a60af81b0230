from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from eagleray.config.loader import LoadedFile, load_files
from eagleray.errors import ConfigError

MessageOf = Callable[..., str]


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., LoadedFile]:
    """Load one file from its text, with nothing in the environment unless a test says so."""

    def load_one(text: str, overrides: Sequence[str] = (), store: str | None = None, **environ: str) -> LoadedFile:
        path = tmp_path / "file.yaml"
        path.write_text(text, encoding="utf-8")
        return load_files([path], overrides, store, environ)[0]

    return load_one


@pytest.fixture
def message(load: Callable[..., LoadedFile], tmp_path: Path) -> MessageOf:
    """Return what is said about a wrong file, without the folder it lies in."""

    def message_of(text: str, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        assert caught.value.exit_code == 2
        return caught.value.message.replace(f"{tmp_path}/", "")

    return message_of
