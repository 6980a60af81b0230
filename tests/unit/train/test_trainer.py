"""Which of Ray Train's actors a run starts: held against the Ray that is installed, whose names are private."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from eagleray_jobs.train.trainer import trainer_class


def build(*, is_local: bool) -> Any:
    from ray.train import ScalingConfig

    return trainer_class(is_local=is_local)(lambda: None, scaling_config=ScalingConfig(num_workers=2))


@pytest.mark.parametrize(
    ("is_local", "dropped"),
    [(True, {"DatasetsCallback", "PlacementGroupCleanerCallback"}), (False, {"DatasetsCallback"})],
)
def test_ray_trains_callbacks_are_all_there_but_those_that_start_idle_actors(
    is_local: bool, dropped: set[str]
) -> None:
    from ray.train.torch import TorchTrainer

    trainer = build(is_local=is_local)
    all_of_ray = {type(callback).__name__ for callback in TorchTrainer._create_default_callbacks(trainer)}
    kept = {type(callback).__name__ for callback in trainer._create_default_callbacks()}
    assert dropped <= all_of_ray and kept == all_of_ray - dropped


def test_on_this_machine_nobody_is_asked_for_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision

    started: dict[str, Any] = {}
    monkeypatch.setattr(
        TorchTrainer, "_initialize_and_run_controller", lambda self, **arguments: started.update(arguments)
    )
    trainer = build(is_local=True)
    trainer._initialize_and_run_controller(scaling_policy=None, callbacks=[])
    policy = started["scaling_policy"]
    assert isinstance(policy, FixedScalingPolicy) and started["callbacks"] == []
    policy.after_controller_start(trainer.train_run_context)  # without a Ray, which the request would need
    decision = policy.make_decision_for_non_running_worker_group()
    assert isinstance(decision, ResizeDecision) and decision.num_workers == 2
    asyncio.run(policy.before_controller_shutdown())
    policy.before_controller_abort()
