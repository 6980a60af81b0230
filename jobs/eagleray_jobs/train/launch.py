"""Ray Train's own configuration objects, made from ours: one function each, and nothing else knows them."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from eagleray.config.schema import RunConfig, TrainConfig
from eagleray.resources import ResourceRequest
from eagleray_jobs.train.failures import find_fatal
from eagleray_jobs.train.trainer import trainer_class

ENVIRONMENT = {
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths of the user's code keep their meaning
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",  # also what the end of a run and the death of a worker wait for
    "RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S": "30",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "60",
}
"""Ray Train waits for minutes or forever by default; what the user has set stays."""

LOCAL_ENVIRONMENT = {**ENVIRONMENT, "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0"}
"""The same for a Ray of our own: nobody takes this machine away before its time (see `trainer`)."""

MAX_START_FAILURES = 2
ROOT_CAUSE_WAIT_S = 1.0


def scaling_config(request: ResourceRequest) -> Any:
    """Return Ray Train's ScalingConfig."""
    from ray.train import ScalingConfig

    use_gpu = request.bundle.get("GPU", 0) > 0
    return ScalingConfig(
        num_workers=request.num_bundles, use_gpu=use_gpu, resources_per_worker=dict(request.bundle)
    )


def failure_config(train: TrainConfig) -> Any:
    """Return Ray Train's FailureConfig."""
    from ray.train import FailureConfig

    return FailureConfig(max_failures=train.max_failures, controller_failure_limit=MAX_START_FAILURES)


def run_config(config: RunConfig, train: TrainConfig, scratch: str, board: Any) -> Any:
    """Return Ray Train's RunConfig.

    The name is fresh for every attempt: Ray resumes silently from a name it knows, and cannot start again from a
    snapshot that was cut. Nothing of ours is stored there.
    """
    from ray.train import RunConfig as RayRunConfig

    return RayRunConfig(
        name=f"{config.name}-{uuid.uuid4().hex[:12]}",
        storage_path=scratch,
        failure_config=failure_config(train),
        callbacks=[_stop_on_fatal(board)],
    )


def torch_config(train: TrainConfig) -> Any:
    """Return Ray Train's TorchConfig: the process group's timeout is 1800 s by default."""
    from ray.train.torch import TorchConfig

    return TorchConfig(timeout_s=max(1, round(train.ddp_timeout)))


def build_trainer(
    function: Callable[[dict[str, Any]], None],
    payload: dict[str, Any],
    config: RunConfig,
    train: TrainConfig,
    request: ResourceRequest,
    scratch: str,
    *,
    is_local: bool,
) -> Any:
    """Return the TorchTrainer of a run; `payload["board"]` is its board, `is_local` says that Ray is our own."""
    return trainer_class(is_local=is_local)(
        function,
        train_loop_config=payload,
        torch_config=torch_config(train),
        scaling_config=scaling_config(request),
        run_config=run_config(config, train, scratch, payload["board"]),
    )


@contextmanager
def environment(*, is_local: bool) -> Iterator[None]:
    """Set what Ray Train reads from the driver's environment, and restore it."""
    wanted = LOCAL_ENVIRONMENT if is_local else ENVIRONMENT
    added = {name: value for name, value in wanted.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _stop_on_fatal(board: Any) -> Any:
    """Return the callback of Ray Train's controller that ends a run which a restart would not help.

    Ray restarts workers whatever they raised. A rank that raised for a reason of its own would only do so again.
    """
    import ray
    from ray.train import UserCallback

    class StopOnFatal(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            failures = ray.get(board.failures.remote(), timeout=30)
            if not find_fatal(failures):
                time.sleep(ROOT_CAUSE_WAIT_S)  # the rank that caused it may speak after those that noticed
                failures = ray.get(board.failures.remote(), timeout=30)
            if find_fatal(failures):
                raise RuntimeError("a worker raised; the board has what and where")

    return StopOnFatal()
