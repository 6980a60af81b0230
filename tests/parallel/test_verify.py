"""`eagleray verify` passes what is right, and fails on every fault, in real ranks and under AdamW."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import yaml
from faults import LocalCount, MicroBatchDropped, MissingOnOneRank, NoFault, ReducedTwice, Scaled, SliceRepeated
from ranks import RankGroup
from training import examples_of, make_config
from typer.main import get_command

from eagleray.cli import build_app
from eagleray.config.layout import parse_layout
from eagleray.config.schema import RunConfig
from eagleray.errors import ConfigError
from eagleray.store.objects import ObjectStore
from eagleray.tasks import load_task
from eagleray_jobs.data.prepare import prepare
from eagleray_jobs.verify.layouts import config_for_check
from eagleray_jobs.verify.runner import Runner

Groups = Callable[[int], RankGroup]
FC1, FC2 = "model.decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc2.weight"

FAULTS: dict[str, tuple[str, NoFault, str]] = {
    "gradients doubled": ("ddp2", Scaled(2.0), "model.shared.weight"),
    "one gradient doubled": ("fsdp2", Scaled(2.0, FC1), FC1),
    "gradients divided by the world": ("fsdp2", Scaled(0.5), "model.shared.weight"),
    "a gradient missing on one rank": ("ddp2", MissingOnOneRank(FC2), FC2),
    "norms reduced twice": ("tp2", ReducedTwice("layer_norm"), "encoder.layers.0.self_attn_layer_norm.weight"),
    "biases reduced twice": ("ddp2", ReducedTwice("bias"), "encoder.layers.0.self_attn.v_proj.bias"),
    "a layer halved": ("tp2", Scaled(0.5, "encoder.layers.0."), "encoder.layers.0.self_attn.k_proj.weight"),
    "a slice repeated": ("ddp2", SliceRepeated(), "model.shared.weight"),
    "tokens counted locally": ("ddp2", LocalCount(), "model.shared.weight"),
    "a micro-batch dropped": ("pp2", MicroBatchDropped(), "model.shared.weight"),
    "one replica goes astray": ("ddp2", Scaled(1.001, FC2, only_rank=1), FC2),
}
RUNNING = {"gradients doubled", "a gradient missing on one rank", "a slice repeated", "tokens counted locally",
           "norms reduced twice", "a micro-batch dropped", "one replica goes astray"}  # fmt: skip


@pytest.fixture(scope="module")
def verified(group: Groups, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Runner]]:
    """`verified(optim)` is a tiny translator with dropout in its file, one process trained."""
    folder = tmp_path_factory.mktemp("verify")
    with ExitStack() as stack:
        made: dict[str, Runner] = {}

        def of(optim: str) -> Runner:
            if optim not in made:
                file = with_rows(make_config(dropout=0.1, optim=optim, global_batch_size=16), folder)
                prepared = prepare(file, load_task(file), ObjectStore.open(str(folder / "rows")))
                made[optim] = stack.enter_context(Runner(config_for_check(file, 3)[0], prepared, group))
            return made[optim]

        yield of


def with_rows(config: RunConfig, folder: Path) -> RunConfig:
    """Return the file with rows to train on, in a folder."""
    rows = folder / f"{config.task}.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in examples_of(config.task, 60)))
    data = {"train": str(rows), "validation_split": 0.0, "test_split": 0.0}
    return RunConfig.model_validate(config.model_dump(mode="json") | {"data": data})


@pytest.mark.parametrize(
    "optim, layout", [("adamw", "ddp2"), ("adamw", "pp2"), ("sgd", "fsdp2"), ("sgd", "tp2")], ids=str
)
def test_what_is_right_passes(verified: Callable[[str], Runner], optim: str, layout: str) -> None:
    found = verified(optim).compare(parse_layout(layout))
    assert found.passed, [str(mismatch) for mismatch in found.mismatches]
    assert found.errors.keys() == {"gradients", "norms", "losses", "parameters"}


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=() if name in RUNNING else pytest.mark.slow) for name in FAULTS]
)
def test_every_fault_is_found_and_its_first_tensor_named(verified: Callable[[str], Runner], fault: str) -> None:
    layout, broken, first = FAULTS[fault]
    found = verified("adamw").compare(parse_layout(layout), broken)
    assert [mismatch.quantity for mismatch in found.mismatches[:1]] == ["gradients"]
    assert found.mismatches[0].name.endswith(first)


def test_at_least_eight_faults_are_injected() -> None:
    assert len(FAULTS) == 11 and RUNNING <= FAULTS.keys()


def test_a_layout_that_is_not_possible_is_refused_with_the_numbers(verified: Callable[[str], Runner]) -> None:
    layout = parse_layout("tp3")
    refused = verified("adamw").refusals([layout, parse_layout("tp2")])
    assert list(refused) == [layout]
    with pytest.raises(ConfigError, match="3 does not divide encoder_attention_heads 2") as error:
        verified("adamw").compare(layout)
    assert str(error.value) == str(refused[layout])


def write_file(folder: Path, **model: Any) -> Path:
    """Write a file of an own module."""
    config = with_rows(make_config("text-classification", global_batch_size=16), folder)
    value = config.model_dump(mode="json", exclude_unset=True)
    value["model"] = {"factory": "own_module:build", "config": model, "tokenizer": {"vocab_size": 300}}
    path = folder / "file.yaml"
    path.write_text(yaml.safe_dump(value | {"store": str(folder / "store")}))
    return path


def eagleray(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[int, str, str]:
    """Run the verb as the command line does; return exit status, standard output and standard error."""
    with pytest.raises(SystemExit) as left:
        get_command(build_app()).main(["verify", *map(str, arguments)], prog_name="eagleray")
    captured = capfd.readouterr()
    return int(left.value.code or 0), captured.out, captured.err


def test_the_verb_passes_and_writes_nothing_to_the_store(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = eagleray(capfd, write_file(tmp_path), "--max-workers", "2", "--steps", "2", "--json")
    report = json.loads(out.splitlines()[-1])
    assert (code, report["passed"]) == (0, True), err
    assert [(each["layout"], each["verdict"]) for each in report["layouts"]] == [
        ("ddp2", "same"), ("fsdp2", "same"), ("tp2", "same"), ("pp2", "same"),
    ]  # fmt: skip
    assert not (tmp_path / "store").exists()


def test_a_wrong_plan_of_the_user_is_a_mismatch_that_names_its_tensors(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = write_file(tmp_path, wrong="plan")
    code, out, _ = eagleray(capfd, file, "parallel.sequence_parallel=true", "--layouts", "tp2", "--steps", "1")
    assert code == 1
    assert "tp2: gradients: blocks.0.norm.weight differs by" in out
    assert "0 of 1 layouts give what one process gives" in out


@pytest.mark.slow
def test_a_rank_that_raises_gives_its_traceback_once(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = write_file(tmp_path, wrong="raises")
    code, out, err = eagleray(capfd, file, "--layouts", "ddp2,single", "--steps", "1")
    assert code == 1 and "FAILED" in out
    assert (out + err).count("ValueError: the second rank has had enough\n  File") <= 1
    assert out.count("Traceback") == 1 and "rank 0 only waited" in out
    assert "1 of 2 layouts" in out


@pytest.mark.slow
def test_a_model_that_draws_random_numbers_and_a_layout_that_is_none_are_wrong_calls(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, _, err = eagleray(capfd, write_file(tmp_path, wrong="random"), "--layouts", "ddp2")
    assert code == 2 and "the model draws random numbers in training" in err
    code, _, err = eagleray(capfd, write_file(tmp_path), "--layouts", "ddp2,tp5")
    assert code == 2 and "parallel.tensor_parallel_degree 5 does not divide inner 24" in err
    code, _, err = eagleray(capfd, write_file(tmp_path), "--layouts", "dpp2")
    assert code == 2 and "'dpp2' is no layout" in err
