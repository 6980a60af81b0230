"""The loop on real groups of processes: the number of workers does not show in the result."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import RankGroup, RanksFailed
from training import (
    Gradients,
    Job,
    Outcome,
    checkpoint_tensors,
    committed_steps,
    evaluate_once,
    first_gradients,
    logged_steps,
    make_config,
    replace,
    train,
    with_train,
)

from eagleray.errors import ConfigError, NonFiniteLossError

Groups = Callable[[int], RankGroup]


def run(group: Groups, world_size: int, folder: Path, task: str = "translation", **keys: Any) -> list[Outcome]:
    config = make_config(task, layout=world_size, **keys)
    return group(world_size).run(train, Job(config, str(folder)))


@pytest.mark.parametrize("task", ["translation", "text-classification"])
def test_neither_workers_nor_accumulation_change_losses_and_parameters(
    group: Groups, tmp_path: Path, task: str
) -> None:
    whole: dict[str, Any] = {"cut_by_length": False}
    one = run(group, 1, tmp_path / "1", task, **whole)[0]
    others = {
        "32 x 2": run(group, 2, tmp_path / "2", task, **whole),
        "16 x 2, accumulation 2": run(group, 2, tmp_path / "2a", task, per_device_train_batch_size=16, **whole),
        "21, 21 and 22 x 3": run(group, 3, tmp_path / "3", task, **whole),
        "16 x 2, cut by length": run(group, 2, tmp_path / "2c", task, per_device_train_batch_size=16),
    }
    assert sorted(one.losses) == [1, 2, 3, 4, 5]
    for name, ranks in others.items():
        assert ranks[0].losses == pytest.approx(one.losses, abs=1e-6), name
        for rank in ranks:
            torch.testing.assert_close(rank.tensors, one.tensors, rtol=0, atol=1e-6)
    assert [ranks[0].num_forwards for ranks in others.values()] == [5, 10, 5, 13]


LAYOUTS: dict[str, dict[str, Any]] = {
    "fsdp2": {"data_parallel_shard_degree": 2},
    "tp2": {"tensor_parallel_degree": 2, "sequence_parallel": True},
    "fsdp2.tp2": {
        "data_parallel_shard_degree": 2,
        "tensor_parallel_degree": 2,
        "activation_checkpointing": "selective",
    },
    "pp2": {"pipeline_parallel_degree": 2},
    "pp2.ddp2": {"pipeline_parallel_degree": 2, "data_parallel_replicate_degree": 2, "num_microbatches": 2},
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_changes_neither_losses_nor_parameters_nor_what_is_saved_and_resumed(
    group: Groups, tmp_path: Path, layout: str
) -> None:
    keys = {"save_steps": 3, "eval_steps": 3}
    one = group(1).run(train, Job(make_config(**keys), str(tmp_path / "one"), num_validation=5))[0]
    config = make_config(layout=LAYOUTS[layout], **keys)
    job = Job(config, str(tmp_path / "cut"), num_validation=5)
    workers = 4 if "." in layout else 2
    cut = group(workers).run(train, job)[0]
    assert cut.losses == pytest.approx(one.losses, abs=1e-6)
    assert cut.records[2].scores == pytest.approx(one.records[2].scores, abs=1e-6)
    torch.testing.assert_close(cut.tensors, one.tensors, rtol=0, atol=1e-5)
    for rank in group(1).run(train, replace(job, resume_step=3, config=make_config(**keys))):
        assert rank.losses == pytest.approx({step: one.losses[step] for step in (4, 5)}, abs=1e-6)


@pytest.mark.parametrize("task", ["translation", "text-classification"])
def test_the_first_gradient_is_the_same_tensor_by_tensor(group: Groups, tmp_path: Path, task: str) -> None:
    # AdamW hides a gradient that is doubled everywhere; the unclipped gradients themselves do not.
    config = make_config(task, max_grad_norm=None)
    one = group(1).run(first_gradients, config)[0]
    accumulated = with_train(config, per_device_train_batch_size=16)
    others: list[list[Gradients]] = [
        group(2).run(first_gradients, config),
        group(2).run(first_gradients, accumulated),
        group(3).run(first_gradients, with_train(config, per_device_train_batch_size=7)),
    ]
    assert one.norm > 0.1 and len(one.tensors) > 20
    for ranks in others:
        for rank in ranks:
            torch.testing.assert_close(rank.tensors, one.tensors, rtol=1e-5, atol=1e-7)
            assert rank.norm == pytest.approx(one.norm, rel=1e-5)


def test_ranks_without_a_row_take_part_and_change_nothing(group: Groups, tmp_path: Path) -> None:
    one = run(group, 1, tmp_path / "1", global_batch_size=2)[0]
    three = run(group, 3, tmp_path / "3", global_batch_size=2)
    assert three[0].losses == pytest.approx(one.losses, abs=1e-6)
    torch.testing.assert_close(three[2].tensors, one.tensors, rtol=0, atol=1e-6)
    # 5 rows over 3 ranks, 1 per pass: two passes everywhere, one of them empty on a rank.
    one = run(group, 1, tmp_path / "1b", global_batch_size=5)[0]
    three = run(group, 3, tmp_path / "3b", global_batch_size=5, per_device_train_batch_size=1)
    assert [rank.num_forwards for rank in three] == [10, 10, 10]
    assert three[0].losses == pytest.approx(one.losses, abs=1e-6)


@pytest.mark.parametrize("keys", [{"optim": "sgd", "momentum": 0.9}, {"bf16": True}, {"weight_decay": 0.1}])
def test_other_optimizers_and_bf16_reduce_the_loss(group: Groups, tmp_path: Path, keys: dict[str, Any]) -> None:
    ranks = run(group, 2, tmp_path, max_steps=20, learning_rate=0.05 if "optim" in keys else 5e-3, **keys)
    assert ranks[0].losses[20] < 0.9 * ranks[0].losses[1]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_compiled_model_trains_and_commits_what_an_uncompiled_one_does(group: Groups, tmp_path: Path) -> None:
    """Compiled for real, by the C++ compiler: two ranks, sequences of mixed length, and a run that goes on."""
    plain = make_config("text-classification", layout=2, save_steps=3, ddp_timeout=600.0)
    job = Job(plain, str(tmp_path / "plain"))
    expected = group(2).run(train, job)[0]
    compiled = replace(job, config=with_train(plain, torch_compile=True), folder=str(tmp_path / "compiled"))
    found = group(2).run(train, compiled, timeout_s=1100)[0]
    assert found.losses == pytest.approx(expected.losses, abs=1e-5)
    torch.testing.assert_close(found.tensors, expected.tensors, rtol=0, atol=1e-4)
    again = group(2).run(train, replace(compiled, config=plain, resume_step=3))[0]
    assert again.losses == pytest.approx({step: expected.losses[step] for step in (4, 5)}, abs=1e-5)


def test_two_runs_of_one_file_are_bitwise_equal_with_dropout(group: Groups, tmp_path: Path) -> None:
    first, second = (run(group, 2, tmp_path / name, dropout=0.3)[0] for name in ("a", "b"))
    assert_bitwise_equal(first.tensors, second.tensors)
    without = run(group, 2, tmp_path / "c")[0]
    assert first.losses != without.losses


def assert_bitwise_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("optim", ["adamw", "sgd"])
def test_a_run_that_is_ended_again_and_again_equals_an_uninterrupted_one(
    group: Groups, tmp_path: Path, optim: str
) -> None:
    keys = {"optim": optim, "momentum": 0.9 if optim == "sgd" else 0.0, "max_steps": 12, "save_steps": 3}
    config = make_config(layout=2, dropout=0.3, warmup_steps=4.0, global_batch_size=48, **keys)
    group(2).run(train, Job(config, str(tmp_path / "whole")))
    torn, ends = tmp_path / "torn", [5, 7, 8, 12]
    for abandon_at in [*ends, None]:
        resume = max(committed_steps(str(torn)), default=None)
        group(2).run(train, Job(config, str(torn), resume_step=resume, abandon_at=abandon_at))
    assert committed_steps(str(torn)) == committed_steps(str(tmp_path / "whole")) == [3, 6, 9, 12]
    assert_bitwise_equal(checkpoint_tensors(str(torn), 12), checkpoint_tensors(str(tmp_path / "whole"), 12))
    assert logged_steps(str(torn)) == list(range(1, 13))


@pytest.mark.slow
@pytest.mark.parametrize("step", range(1, 13))
def test_ended_at_any_step(group: Groups, tmp_path: Path, step: int) -> None:
    config = make_config("text-classification", layout=2, dropout=0.3, max_steps=12, save_steps=2)
    group(2).run(train, Job(config, str(tmp_path / "whole")))
    group(2).run(train, Job(config, str(tmp_path / "torn"), abandon_at=step))
    resume = max(committed_steps(str(tmp_path / "torn")), default=None)
    group(2).run(train, Job(config, str(tmp_path / "torn"), resume_step=resume))
    whole, torn = (checkpoint_tensors(str(tmp_path / name), 12) for name in ("whole", "torn"))
    assert_bitwise_equal(whole, torn)


@pytest.mark.parametrize("before, after", [(2, 1), (1, 3)])
def test_other_workers_go_on_with_the_same_examples_and_losses(
    group: Groups, tmp_path: Path, before: int, after: int
) -> None:
    # 10 steps of 40 rows are two epochs of 200; the cut at step 4 lies inside of the first.
    keys = {"max_steps": 10, "save_steps": 4, "global_batch_size": 40}
    config = make_config("text-classification", layout=before, **keys)
    whole = group(before).run(train, Job(config, str(tmp_path / "whole")))
    first = group(before).run(train, Job(config, str(tmp_path / "cut"), abandon_at=6))
    resume = max(committed_steps(str(tmp_path / "cut")))
    other = make_config("text-classification", layout=after, **keys)
    second = group(after).run(train, Job(other, str(tmp_path / "cut"), resume_step=resume))
    assert resume == 4
    for step in range(5, 11):
        assert second[0].losses[step] == pytest.approx(whole[0].losses[step], abs=1e-5)
    seen = Counter[int]()
    for rank in first:
        seen.update(row for step, rows in rank.seen.items() if step <= resume for row in rows)
    half = sum(seen.values())
    for rank in second:
        seen.update(row for rows in rank.seen.values() for row in rows)
    assert half == 160
    assert seen == Counter(dict.fromkeys(range(200), 2))


def test_one_rank_asked_to_stop_stops_all_at_the_same_step_with_a_commit(group: Groups, tmp_path: Path) -> None:
    config = make_config(layout=2, max_steps=9, dropout=0.3, logging_steps=4)
    group(2).run(train, Job(config, str(tmp_path / "whole")))
    stopped = group(2).run(train, Job(config, str(tmp_path / "cut"), stop_at=(5, 1)))
    assert [(rank.result.outcome, rank.result.step) for rank in stopped if rank.result] == [("stopped", 5)] * 2
    assert stopped[0].result and stopped[0].result.ref == "tiny@r1-step-00000005"
    assert committed_steps(str(tmp_path / "cut")) == [5]
    ended = group(2).run(train, Job(config, str(tmp_path / "cut"), resume_step=5))
    assert ended[0].result and ended[0].result.outcome == "finished"
    whole, cut = (checkpoint_tensors(str(tmp_path / name), 9) for name in ("whole", "cut"))
    assert_bitwise_equal(whole, cut)


def test_stop_at_step_commits_and_the_schedule_still_aims_at_the_end(group: Groups, tmp_path: Path) -> None:
    config = make_config(layout=2, max_steps=8)
    whole = group(2).run(train, Job(config, str(tmp_path / "whole")))[0]
    part = group(2).run(train, Job(with_train(config, stop_at_step=3), str(tmp_path / "cut")))[0]
    assert part.result and (part.result.outcome, part.result.step) == ("stopped_at_step", 3)
    assert committed_steps(str(tmp_path / "cut")) == [3]
    rates = {record.step: record.learning_rate for record in whole.records}
    assert {record.step: record.learning_rate for record in part.records} == {s: rates[s] for s in (1, 2, 3)}
    again = group(2).run(train, Job(with_train(config, stop_at_step=3), str(tmp_path / "cut"), resume_step=3))[0]
    assert again.result and (again.result.outcome, again.result.step) == ("stopped_at_step", 3)
    assert again.result.ref == "tiny@r1-step-00000003" and again.num_forwards == 0


def test_a_loss_that_is_not_finite_ends_all_ranks_and_names_the_last_good_checkpoint(
    group: Groups, tmp_path: Path
) -> None:
    config = make_config(layout=2, max_steps=9, save_steps=2)
    ranks = group(2).run(train, Job(config, str(tmp_path), nan_at=(5, 1), fails=True))
    for rank in ranks:
        assert isinstance(rank.error, NonFiniteLossError)
        assert rank.error.message == "the loss of step 5 is nan on rank 1"
        assert "the last good checkpoint: tiny@r1-step-00000004" in str(rank.error)
    assert committed_steps(str(tmp_path)) == [2, 4]


def test_an_infinite_gradient_of_a_finite_loss_is_never_committed(group: Groups, tmp_path: Path) -> None:
    config = make_config(layout=2, max_steps=9, save_steps=2, logging_steps=100)
    ranks = group(2).run(train, Job(config, str(tmp_path), infinite_gradient_at=(4, 1), fails=True))
    for rank in ranks:
        assert isinstance(rank.error, NonFiniteLossError)
        assert rank.error.message == "the gradient of step 4 is not finite"
    assert committed_steps(str(tmp_path)) == [2]


def test_scores_go_into_the_checkpoint_of_their_step_and_patience_ends_the_run(
    group: Groups, tmp_path: Path
) -> None:
    # The scripted score is best at step 4.
    config = make_config(
        layout=2,
        max_steps=20,
        eval_steps=2,
        save_steps=4,
        early_stopping_patience=2,
        metric_for_best_model="quality",
    )
    ranks = group(2).run(train, Job(config, str(tmp_path), num_validation=31))
    for rank in ranks:
        assert rank.result is not None
        assert (rank.result.outcome, rank.result.step) == ("early_stopped", 8)
        assert (rank.result.best_score, rank.result.best_step) == (1.0, 4)
    assert [record.step for record in ranks[0].records if record.scores] == [2, 4, 6, 8]
    scores = ranks[0].records[3].scores
    assert scores is not None and scores["answered"] == 31 and scores["loss"] > 0
    assert {step: manifest_scores(tmp_path, step)["quality"] for step in (4, 8)} == {4: 1.0, 8: 0.6}


def manifest_scores(folder: Path, step: int) -> dict[str, float]:
    from eagleray.store.checkpoint import Checkpoint
    from eagleray.store.objects import ObjectStore

    return Checkpoint.open(ObjectStore.open(str(folder)), "tiny", f"r1-step-{step:08d}").manifest.metrics


def test_early_stopping_goes_on_counting_after_a_resume(group: Groups, tmp_path: Path) -> None:
    config = make_config(
        layout=2,
        max_steps=20,
        eval_steps=2,
        save_steps=2,
        early_stopping_patience=2,
        metric_for_best_model="quality",
    )
    job = Job(config, str(tmp_path), num_validation=8)
    group(2).run(train, job.replaced(abandon_at=7))
    ended = group(2).run(train, job.replaced(resume_step=6))
    assert ended[0].result and (ended[0].result.outcome, ended[0].result.step) == ("early_stopped", 8)
    assert ended[0].result.best_step == 4


@pytest.mark.parametrize("task", ["translation", "text-classification"])
def test_scores_do_not_depend_on_the_number_of_workers(group: Groups, task: str) -> None:
    config = make_config(task, per_device_eval_batch_size=8)
    one = group(1).run(evaluate_once, config, 30)[0]
    for world_size in (2, 3):
        for scores in group(world_size).run(evaluate_once, config, 30):
            assert scores == pytest.approx(one, abs=1e-6)


def test_every_rank_learns_of_a_commit_between_the_same_two_steps(group: Groups, tmp_path: Path) -> None:
    config = make_config(layout=2, max_steps=30, save_steps=5, save_total_limit=1)
    ranks = group(2).run(train, Job(config, str(tmp_path)))
    told = [[(step, result.ref) for step, result in rank.saved] for rank in ranks]
    assert told[0] == told[1]
    assert [ref for _, ref in told[0]] == [f"tiny@r1-step-{step:08d}" for step in range(5, 31, 5)]
    # Retention follows every commit, on one rank.
    assert [rank.num_prunes for rank in ranks] == [6, 0]


def test_where_a_rank_has_no_room_for_a_copy_all_wait_for_saves_and_save_the_same(
    group: Groups, tmp_path: Path
) -> None:
    config = make_config(layout={"data_parallel_shard_degree": 2}, max_steps=6, save_steps=2)
    group(2).run(train, Job(config, str(tmp_path / "copied")))
    ranks = group(2).run(train, Job(config, str(tmp_path / "waiting"), without_room=1))
    for rank in ranks:
        assert [(step, result.step) for step, result in rank.saved] == [(2, 2), (4, 4), (6, 6)]
    for step in (2, 4, 6):
        copied, waiting = (checkpoint_tensors(str(tmp_path / name), step) for name in ("copied", "waiting"))
        assert_bitwise_equal(copied, waiting)


def test_a_parameter_that_the_loss_ignores_is_named_with_what_to_do(group: Groups, tmp_path: Path) -> None:
    config = make_config("text-classification", layout=2)
    error = group(2).run(train, Job(config, str(tmp_path), unused_parameter=True, fails=True))[1].error
    assert isinstance(error, ConfigError)
    assert error.message == "the loss does not depend on 1 trained parameters: extra"
    assert error.hint == "name them under model.freeze"


def test_frozen_parameters_stay_and_have_no_optimizer_state(group: Groups, tmp_path: Path) -> None:
    config = make_config("text-classification", layout=2, save_steps=3)
    frozen = config.model_copy(update={"model": config.model.model_copy(update={"freeze": ["bert.embeddings.*"]})})
    before = group(2).run(train, Job(with_train(frozen, max_steps=1, learning_rate=0.0), str(tmp_path / "0")))
    after = group(2).run(train, Job(frozen, str(tmp_path / "1"), abandon_at=5))
    names = [name for name in after[0].tensors if name.startswith("bert.embeddings.")]
    assert len(names) > 3
    assert_bitwise_equal({n: before[0].tensors[n] for n in names}, {n: after[0].tensors[n] for n in names})
    stored = checkpoint_tensors(str(tmp_path / "1"), 3)
    assert not [name for name in stored if name.startswith("optim.bert.embeddings.")]
    group(2).run(train, Job(frozen, str(tmp_path / "1"), resume_step=3))
    assert committed_steps(str(tmp_path / "1")) == [3, 5]


def test_a_failed_save_is_told_and_the_run_goes_on(group: Groups, tmp_path: Path) -> None:
    config = make_config(layout=2, max_steps=6, save_steps=2)
    ranks = group(2).run(train, Job(config, str(tmp_path), refuse_save_of=4))
    results = {result.step: result for _, result in ranks[0].saved}
    assert results[4].ref is None and "refused" in str(results[4].error)
    assert committed_steps(str(tmp_path)) == [2, 6]
    assert ranks[0].result and ranks[0].result.ref == "tiny@r1-step-00000006"


def test_a_killed_process_loses_nothing_that_was_committed(group: Groups, tmp_path: Path) -> None:
    # The last test of this file: the group has to start anew.
    config = make_config("text-classification", layout=2, dropout=0.3, max_steps=8, save_steps=2)
    group(2).run(train, Job(config, str(tmp_path / "whole")))
    with pytest.raises(RanksFailed, match="exit status 9"):
        group(2).run(train, Job(config, str(tmp_path / "torn"), kill_at=(6, 1)))
    resume = max(committed_steps(str(tmp_path / "torn")))
    assert resume in (2, 4)
    group(2).run(train, Job(config, str(tmp_path / "torn"), resume_step=resume))
    whole, torn = (checkpoint_tensors(str(tmp_path / name), 8) for name in ("whole", "torn"))
    assert_bitwise_equal(whole, torn)
    assert logged_steps(str(tmp_path / "torn")) == list(range(1, 9))
