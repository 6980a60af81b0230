"""Settings that are legal and have no effect."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from eagleray.config.loader import LoadedFile

FILE = "name: x\ntask: translation\nmodel: {family: marian}\ndata: {source: cldr-en-fr}\ntrain: {max_steps: 100}\n"


@pytest.mark.parametrize(
    "overrides, warning",
    [
        (["train.momentum=0.9"], 'train.momentum is 0.9, which has no effect while train.optim is "adamw"'),
        (
            ["train.optim=sgd", "train.adam_beta1=0.8"],
            'train.adam_beta1 is 0.8, which has no effect while train.optim is "sgd"',
        ),
        (
            ["train.learning_rate_reference_batch_size=32"],
            "train.learning_rate_reference_batch_size is 32, which has no effect while "
            'train.learning_rate_scaling is "none"',
        ),
        (
            ["train.early_stopping_threshold=0.1"],
            "train.early_stopping_threshold is 0.1, which has no effect while "
            "train.early_stopping_patience is null",
        ),
        (
            ["train.warmup_steps=200"],
            "train.warmup_steps is 200 and train.max_steps is 100: the learning rate never leaves the warm-up",
        ),
        (
            ["train.stop_at_step=100"],
            "train.stop_at_step is 100, which has no effect while train.max_steps is 100",
        ),
        (["train.save_steps=500"], "train.save_steps is 500, which has no effect while train.max_steps is 100"),
        (
            ["data.validation=v.csv", "data.validation_split=0.1"],
            'data.validation_split is 0.1, which has no effect while data.validation is "/v.csv"',
        ),
        (
            ["data.languages=[de, no]"],
            'data.languages is ["de", "no"], which has no effect while data.source is "cldr-en-fr"',
        ),
        (
            ["serve.num_replicas=2", "serve.autoscaling_config={max_replicas: 8}"],
            'serve.autoscaling_config is {"max_replicas": 8}, which has no effect while serve.num_replicas is 2',
        ),
    ],
)
def test_a_setting_without_effect_is_named_once_with_both_values(
    load: Callable[..., LoadedFile], monkeypatch: pytest.MonkeyPatch, overrides: list[str], warning: str
) -> None:
    monkeypatch.chdir("/")
    assert load(FILE, overrides).warnings == (warning,)


def test_a_file_without_contradictions_warns_of_nothing(load: Callable[..., LoadedFile]) -> None:
    assert load(FILE, ["train.warmup_steps=0.1", "serve.num_replicas=2"]).warnings == ()
