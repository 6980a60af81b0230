"""Ray Train's trainer without the actors that a run of ours has no use for.

Beside its workers Ray Train starts up to six actors. Each is a process that imports Ray Train, some seconds of a
core before the first step, and wakes a hundred times a second from then on, between the steps of workers that
compute on every core.

| actor | what for | kept |
|---|---|---|
| the controller, the synchronization of `report` | without them nothing runs | always |
| manager of Ray datasets | hands out shards; our data comes from the store | never |
| coordinator of autoscaling | asks for nodes | on a cluster that was joined |
| cleaner of placement groups | frees what a dead controller held | on a cluster that was joined |
| watcher of preemption (a switch of `launch`) | learns that a node goes away | on a cluster that was joined |
"""

from __future__ import annotations

from typing import Any


def trainer_class(*, is_local: bool) -> Any:
    """Return the class to make the trainer of.

    Args:
        is_local: The Ray is ours, on this machine alone, and ends with the run.
    """
    from ray.train.torch import TorchTrainer
    from ray.train.v2._internal.callbacks import DatasetsCallback
    from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback

    dropped = (DatasetsCallback, PlacementGroupCleanerCallback) if is_local else (DatasetsCallback,)

    class LeanTrainer(TorchTrainer):  # type: ignore[misc]
        def _create_default_callbacks(self) -> list[Any]:
            found: list[Any] = super()._create_default_callbacks()
            return [callback for callback in found if not isinstance(callback, dropped)]

        def _initialize_and_run_controller(self, *, scaling_policy: Any, **others: Any) -> Any:
            if is_local:
                scaling_policy = _policy_without_autoscaler(self.scaling_config)
            return super()._initialize_and_run_controller(scaling_policy=scaling_policy, **others)

    return LeanTrainer


def _policy_without_autoscaler(scaling_config: Any) -> Any:
    """Return Ray Train's policy of a fixed number of workers, without its requests to an autoscaler."""
    from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

    class FixedOnThisMachine(FixedScalingPolicy):  # type: ignore[misc]
        def _send_resource_request(self) -> None: ...

        def _maybe_send_resource_request(self) -> None: ...

        def _cancel_resource_request(self) -> None: ...

    return FixedOnThisMachine(scaling_config)
