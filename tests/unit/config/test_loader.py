"""From files to configurations, or to messages with file, line and key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from eagleray.config.loader import LoadedFile, load_files, split_arguments
from eagleray.config.schema import ParallelText
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
"""
OWN_FILES = FILE.replace("source: cldr-en-fr", "train: rows/*.jsonl")

Load = Callable[..., LoadedFile]
MessageOf = Callable[..., str]


def test_a_file_becomes_a_configuration(load: Load) -> None:
    config = load(FILE + "parallel: {dp_replicate_size: 2}\n").config
    assert config.name == "en-fr"
    assert config.train is not None and config.train.learning_rate == 0.002
    assert config.parallel.data_parallel_replicate_degree == 2


def test_an_override_wins_also_under_an_alias_and_in_a_section_that_is_not_there(load: Load) -> None:
    overrides = ["train.learning_rate=1e-4", "parallel.dp_replicate_size=4", "serve.num_replicas=3", "code=[]"]
    config = load(FILE + "parallel: {data_parallel_replicate_degree: 2}\n", overrides).config
    assert config.train is not None and config.train.learning_rate == 1e-4
    assert config.parallel.data_parallel_replicate_degree == 4
    assert config.serve.num_replicas == 3


@pytest.mark.parametrize(
    "override, value",
    [
        ("serve.ref=@latest", "@latest"),
        ("serve.ref='@best'", "@best"),
        ("serve.ref=*", "*"),
        ("serve.ref=a: b # c", "a: b # c"),
        ("serve.ref=", None),
        ("serve.ref=null", None),
    ],
)
def test_a_word_of_the_command_line_is_text_as_it_stands(load: Load, override: str, value: str | None) -> None:
    assert load(FILE, [override]).config.serve.ref == value


def test_an_override_into_an_anchored_section_changes_that_section_alone(load: Load) -> None:
    text = FILE.replace("data:\n", "data: &data\n") + "serve:\n  autoscaling_config: &a {max_replicas: 3}\n"
    config = load(text, ["serve.autoscaling_config.max_replicas=5"]).config
    assert config.serve.autoscaling_config.max_replicas == 5


@pytest.mark.parametrize(
    "option, in_file, variable, chosen",
    [("a", "b", "c", "a"), (None, "b", "c", "b"), (None, None, "c", "c"), (None, None, "", "./store")],
)
def test_the_store_comes_from_the_option_the_file_the_environment(
    load: Load, option: str | None, in_file: str | None, variable: str, chosen: str
) -> None:
    text = FILE + (f"store: {in_file}\n" if in_file else "")
    assert load(text, store=option, EAGLERAY_STORE=variable).config.store == chosen


def test_paths_are_relative_to_the_file_and_those_of_the_command_line_to_the_working_directory(
    load: Load, tmp_path: Path
) -> None:
    (tmp_path / "mine").mkdir()
    text = OWN_FILES + "code: [./mine]\nstore: ./there\n"
    config = load(text, ["data.validation=rows.csv", "data.test=[s3://b/t.csv, /abs.csv]"]).config
    assert config.data.train == str(tmp_path / "rows/*.jsonl")
    assert config.data.validation == str(Path.cwd() / "rows.csv")
    assert config.data.test == ["s3://b/t.csv", "/abs.csv"]
    assert config.code == [str(tmp_path / "mine")]
    assert config.store == "./there"


def test_parallel_text_and_a_pretrained_directory_become_absolute_and_a_hub_id_stays(
    load: Load, tmp_path: Path
) -> None:
    (tmp_path / "opus").mkdir()
    text = OWN_FILES.replace("train: rows/*.jsonl", "train: {source: a.en, target: [a.fr]}")
    text = text.replace("family: marian\n  config: {d_model: 128}", "pretrained: opus")
    config = load(text).config
    assert config.data.train == ParallelText(source=str(tmp_path / "a.en"), target=[str(tmp_path / "a.fr")])
    assert config.model.pretrained == str(tmp_path / "opus")
    assert load(text.replace("opus", "org/opus")).config.model.pretrained == "org/opus"


def test_an_unknown_key_names_file_line_key_the_nearest_and_the_valid_ones(message: MessageOf) -> None:
    first, valid = message(FILE.replace("learning_rate", "learning_rat")).splitlines()
    assert first == "file.yaml:10: train.learning_rat is not a key of train; did you mean learning_rate?"
    assert valid.startswith("  valid keys of train: adam_beta1, adam_beta2,")


@pytest.mark.parametrize(
    "change, said",
    [
        (("1200", "many"), '9: train.max_steps is "many", but must be a whole number'),
        (("1200", "1e3"), "9: train.max_steps is 1000.0, but must be a whole number"),
        (("1200", "0"), "9: train.max_steps is 0, but must be above 0"),
        (("2e-3", "-1"), "10: train.learning_rate is -1, but must be at least 0.0"),
        (("2e-3", ".inf"), "10: train.learning_rate is Infinity, but must be a finite number"),
        (("learning_rate: 2e-3", "bf16: yes"), '10: train.bf16 is "yes", but must be true or false'),
        (("1200", "1200\n  num_train_epochs: 3"), "8: train: set exactly one of max_steps and num_train_epochs"),
        (
            ("cldr-en-fr", "cldr"),
            "7: data.source is \"cldr\", but must be 'cldr-en-fr', 'cldr-langid' or 'digits'",
        ),
        (("source: cldr-en-fr", "train: 3"), "7: data.train is 3, but must be text or a list or a section"),
        (
            ("source: cldr-en-fr", "train: {source: a}"),
            "7: data.train.target is missing: Files of the target language, in the same order.",
        ),
        (("source: cldr-en-fr", "columns: {}"), "6: data: set either source or train (files); found neither"),
        (
            ("family: marian", "revision: x"),
            "3: model: set exactly one of family, pretrained and factory; found none of them",
        ),
        (("{d_model: 128}", "[1]"), "5: model.config is [1], but must be a section"),
        (("d_model: 128", "dropout: 2"), "5: model.config.dropout is 2, but must be below 1.0"),
        (("d_model: 128", "d_model: 7"), "5: model.config: d_model must be even, found 7"),
        (
            ("name: en-fr", "name: En/Fr"),
            '1: name is "En/Fr", but must be text that matches ^[a-z0-9][a-z0-9._-]{0,127}$',
        ),
        (
            ("task: translation", "task: translate"),
            "2: task: 'translate' is not translation, text-classification, image-classification or your own "
            "package.module:Task; did you mean translation?",
        ),
        (
            ("family: marian\n  config: {d_model: 128}", "family: bert"),
            "4: model.family bert is made for text-classification, but task is translation; "
            "set model.family to marian",
        ),
        (
            ("cldr-en-fr", "digits"),
            "7: data.source digits holds examples of image-classification, but task is translation",
        ),
        (("task: translation", "code: [nowhere]"), ": task is missing: translation, text-classification,"),
        (("name: en-fr", "serve:\nname: en-fr"), "1: serve is null, but must be a section"),
    ],
)
def test_a_wrong_value_is_named_with_its_line_and_what_would_be_right(
    message: MessageOf, change: tuple[str, str], said: str
) -> None:
    assert change[0] in FILE
    where = "file.yaml" if said.startswith(":") else "file.yaml:"
    assert message(FILE.replace(*change)).startswith(where + said)


def test_degrees_that_do_not_multiply_print_the_equation(message: MessageOf) -> None:
    text = FILE + "parallel: {dp_replicate_size: 2, tp_size: 2, pp_size: 2}\nresources: {num_workers: 6}\n"
    first, hint = message(text).splitlines()
    assert first == "file.yaml:11: 2 (replicate) x 2 (tensor) x 2 (pipeline) = 8, but num_workers is 6"
    assert hint.startswith("  Change the degrees")


def test_two_spellings_of_one_setting_are_refused(message: MessageOf) -> None:
    found = message(FILE + "parallel: {tp_size: 2, tensor_parallel_degree: 2}\n")
    assert found == "file.yaml:11: parallel.tp_size and tensor_parallel_degree are the same setting"


def test_a_misspelt_key_of_a_family_is_found(message: MessageOf) -> None:
    found = message(FILE.replace("d_model", "d_modle"))
    assert found.startswith(
        "file.yaml:5: model.config.d_modle is not a key of model.config; did you mean d_model?"
    )


def test_code_that_is_not_there_is_named(message: MessageOf) -> None:
    assert message(FILE + "code:\n  - nowhere\n") == "file.yaml:12: code: nowhere is not a directory"


def test_several_problems_are_reported_together_in_the_order_of_the_file(message: MessageOf) -> None:
    found = message(FILE.replace("1200", "many").replace("family", "famly"), "train.seed=-1")
    said = [line for line in found.splitlines() if not line.startswith("  ")]
    assert said == [
        "file.yaml, on the command line: train.seed is -1, but must be at least 0",
        "file.yaml:4: model.famly is not a key of model; did you mean family?",
        'file.yaml:9: train.max_steps is "many", but must be a whole number',
    ]


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.a.b=1", "train.a is not a key of train"),
        ("name.x=2", "name.x cannot be set: name is a value, not a section"),
        ("train.learning_rte=2", "train.learning_rte is not a key of train; did you mean learning_rate?"),
        ("train.max_steps=x", 'train.max_steps is "x", but must be a whole number'),
    ],
)
def test_a_wrong_override_is_explained_like_the_file(message: MessageOf, override: str, said: str) -> None:
    assert message(FILE, override).startswith(f"file.yaml, on the command line: {said}")


@pytest.mark.parametrize(
    "override, said",
    [
        ("train.max_steps", r"train\.max_steps is not key\.sub=value"),
        ("=3", "=3 is not key"),
        ("a=[1", r"the value of a=\[1: malformed YAML"),
        ("a=[!!python/name:os.system x]", "tag !!python/name:os.system is not accepted"),
    ],
)
def test_an_override_that_is_no_key_and_value_is_an_error_of_the_call(
    load: Load, override: str, said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        load(FILE, [override])


def test_problems_of_all_files_are_reported_and_a_name_stands_once(tmp_path: Path) -> None:
    one, two = tmp_path / "1.yaml", tmp_path / "2.yaml"
    one.write_text(FILE.replace("1200", "x"))
    two.write_text(FILE.replace("1200", "y"))
    with pytest.raises(ConfigError) as caught:
        load_files([one, two])
    assert [line.split(" ")[0] for line in caught.value.message.splitlines()] == [f"{one}:9:", f"{two}:9:"]
    with pytest.raises(ConfigError, match=r"2\.yaml: name en-fr is also the name in .*1\.yaml"):
        load_files([one, two], ["train.max_steps=5"])
    with pytest.raises(UsageError, match="no file is given"):
        load_files([])


def test_a_verb_that_trains_says_so_when_the_section_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(FILE[: FILE.index("train:")])
    assert load_files([path])[0].config.train is None
    with pytest.raises(ConfigError, match=r"serve\.yaml: train is missing"):
        load_files([path], require_train=True)


def test_files_and_overrides_are_told_apart(tmp_path: Path) -> None:
    assert split_arguments(["a.yaml", "b.yaml", "x.y=1"]) == ([Path("a.yaml"), Path("b.yaml")], ["x.y=1"])
    odd = tmp_path / "x=1.yaml"
    odd.touch()
    assert split_arguments([str(odd)]) == ([odd], [])
    with pytest.raises(UsageError, match=r"b\.yaml stands behind x=1"):
        split_arguments(["a.yaml", "x=1", "b.yaml"])


def test_compiling_a_pipeline_is_refused_with_both_keys(message: MessageOf) -> None:
    overrides = ["train.torch_compile=true", "parallel.pipeline_parallel_degree=2"]
    said = message(FILE, *overrides)
    assert "train.torch_compile does not work where parallel.pipeline_parallel_degree is above 1" in said
