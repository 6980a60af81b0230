"""From files to configurations, or to messages with file, line and key."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from eagleray.config.loader import LoadedFile, load_files, split_arguments
from eagleray.errors import ConfigError, UsageError

FILE = """\
name: en-fr
task: translation
model:
  family: marian
  config: {d_model: 128}
data:
  source: cldr-en-fr
train:
  max_steps: 1200
  learning_rate: 2e-3
  warmup_steps: 200
parallel:
  dp_replicate_size: 2
"""

Load = Callable[..., LoadedFile]


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load_one(
        text: str = FILE, overrides: Sequence[str] = (), store: str | None = None, **environ: str
    ) -> LoadedFile:
        path = tmp_path / "file.yaml"
        path.write_text(text)
        return load_files([path], overrides, store, environ)[0]

    return load_one


@pytest.fixture
def message(load: Load, tmp_path: Path) -> Callable[..., str]:
    def message_of(text: str = FILE, *overrides: str) -> str:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        return caught.value.message.replace(f"{tmp_path}/", "")

    return message_of


def test_a_file_becomes_a_configuration(load: Load) -> None:
    config = load().config
    assert config.name == "en-fr"
    assert config.train is not None
    assert config.train.learning_rate == 0.002
    assert config.parallel.data_parallel_replicate_degree == 2


def test_an_override_wins_also_under_an_alias_and_in_a_section_that_is_not_there(load: Load) -> None:
    config = load(
        overrides=["train.learning_rate=1e-4", "parallel.dp_replicate_size=4", "serve.num_replicas=3"]
    ).config
    assert config.train is not None
    assert config.train.learning_rate == 1e-4
    assert config.parallel.data_parallel_replicate_degree == 4
    assert config.serve.num_replicas == 3


@pytest.mark.parametrize(
    "option, in_file, variable, chosen",
    [
        ("a", "b", "c", "a"),
        (None, "b", "c", "b"),
        (None, None, "c", "c"),
        (None, None, "", "./store"),
    ],
)
def test_the_store_comes_from_the_option_the_file_the_environment(
    load: Load, option: str | None, in_file: str | None, variable: str, chosen: str
) -> None:
    text = FILE + (f"store: {in_file}\n" if in_file else "")
    assert load(text, store=option, EAGLERAY_STORE=variable).config.store == chosen


def test_an_unknown_key_names_file_line_key_the_nearest_and_the_valid_ones(message: Callable[..., str]) -> None:
    found = message(FILE.replace("learning_rate", "learning_rat"))
    first, valid = found.splitlines()
    assert first == "file.yaml:10: train.learning_rat is not a key of train; did you mean learning_rate?"
    assert valid.startswith("  valid keys of train: adam_beta1, adam_beta2,")


def test_several_problems_are_reported_together(message: Callable[..., str]) -> None:
    text = FILE.replace("max_steps: 1200", "max_steps: many").replace("family: marian", "famly: marian")
    found = message(text)
    assert "file.yaml:4: model.famly is not a key of model; did you mean family?" in found
    assert 'file.yaml:9: train.max_steps is "many", but must be a whole number' in found


def test_files_and_overrides_are_told_apart() -> None:
    assert split_arguments(["a.yaml", "b.yaml", "x.y=1"]) == ([Path("a.yaml"), Path("b.yaml")], ["x.y=1"])
    with pytest.raises(UsageError, match=r"b\.yaml stands behind x=1"):
        split_arguments(["a.yaml", "x=1", "b.yaml"])
