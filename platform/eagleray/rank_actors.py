"""The ranks of a group as Ray actors: one in each bundle of a placement group, owned by the process that leads."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagleray.config.schema import ServeConfig
from eagleray.errors import EaglerayError, ServingError

if TYPE_CHECKING:
    from eagleray.engine import Engine
    from eagleray.engine.group import RankSpec
    from eagleray.store.checkpoint import Checkpoint

logger = logging.getLogger(__name__)

END_TIMEOUT_S = 5.0
PLACE_TIMEOUT_S = 600.0
SHARE_OF_GPU = 4
"""Groups that a bundle's GPU has room for, as Ray counts it: a new version is loaded beside the old one."""

Bundle = Mapping[str, float]


def bundles(num_ranks: int, num_cpus: float, num_gpus: float) -> list[dict[str, float]]:
    """Return what a group asks of a cluster: a bundle for each rank, whatever leads it goes into the first one."""
    each = {name: amount for name, amount in (("CPU", num_cpus), ("GPU", num_gpus)) if amount}
    return [dict(each or {"CPU": 0.01}) for _ in range(num_ranks)]


def load_on_actors(
    checkpoint: Checkpoint,
    serve: ServeConfig,
    *,
    num_cpus: float,
    num_gpus: float,
    code: Sequence[str],
    own_group: bool = False,
    try_out: Callable[[Engine], None] = lambda _: None,
) -> Engine:
    """Load a version onto a group of actors, in the placement group of this actor or in one of its own.

    Once the engine is returned, this process ends when a rank is lost: whatever it has in work is asked again
    elsewhere, and whoever started it starts another one.

    Args:
        checkpoint: The opened version.
        serve: Its degrees, precision and limits.
        num_cpus: CPUs of one rank.
        num_gpus: GPUs of one rank.
        code: Directories of the user's own packages.
        own_group: Whether the placement group is made here.
        try_out: Called with the engine while a lost rank is still an error like any other.

    Raises:
        ConfigError: The layout cannot cut the model.
        CheckpointDamagedError: A byte is not what was committed.
        ServingError: A rank did not start, or failed while it loaded.
    """
    import ray
    from ray.util.placement_group import get_current_placement_group

    from eagleray.engine.group import GroupPlace, group_layout, load_group

    guard = _Guard(checkpoint.ref)
    with ExitStack() as stack:
        if own_group:
            placed = _reserve(bundles(group_layout(serve).num_workers, num_cpus, num_gpus), stack)
        else:
            placed = get_current_placement_group()
            assert placed is not None, "a replica of several ranks has a placement group"
        place = GroupPlace(
            _launcher(placed, num_cpus, num_gpus, code),
            device_type="cuda" if num_gpus else "cpu",
            host=ray.util.get_node_ip_address(),
            on_lost=guard.lost,
        )
        engine = load_group(checkpoint, serve, place)
        stack.callback(engine.close)
        try_out(engine)
        kept = stack.pop_all()
    engine.close = kept.close
    guard.is_armed = True
    return engine


class _Guard:
    """Ends this process when a rank is lost, once it answers requests."""

    def __init__(self, ref: str) -> None:
        self.ref, self.is_armed = ref, False

    def lost(self, reason: str) -> None:
        """Take note of it."""
        if self.is_armed:
            logger.error(
                "%s: %s; this process ends, and what it had in work is asked again elsewhere", self.ref, reason
            )
            logging.shutdown()
            # No answer is what the front and the pools ask for again elsewhere; an error would reach the client.
            os._exit(1)


def _reserve(wanted: Sequence[Bundle], stack: ExitStack) -> Any:
    import ray
    from ray.util.placement_group import placement_group, remove_placement_group

    placed = placement_group([dict(bundle) for bundle in wanted], strategy="PACK")
    stack.callback(remove_placement_group, placed)
    try:
        ray.get(placed.ready(), timeout=PLACE_TIMEOUT_S)
    except ray.exceptions.GetTimeoutError:
        raise ServingError(
            f"there was no room for {len(wanted)} ranks of {dict(wanted[0])} within {PLACE_TIMEOUT_S:g} s",
            "lower the degrees under serve, or resources.resources_per_worker",
        ) from None
    return placed


def _launcher(
    placed: Any, num_cpus: float, num_gpus: float, code: Sequence[str]
) -> Callable[[Sequence[RankSpec]], RankActors]:
    return lambda specs: RankActors(specs, placed, num_cpus, num_gpus, code)


class RankActors:
    """The processes of a group.

    Args:
        specs: What each rank needs to know.
        placed: A placement group with a bundle for each.
        num_cpus: CPUs of one; the bundle holds them, so that two groups can share it while one is swapped for the
            other.
        num_gpus: GPUs of one.
        code: Directories of the user's own packages.
    """

    def __init__(
        self, specs: Sequence[RankSpec], placed: Any, num_cpus: float, num_gpus: float, code: Sequence[str]
    ) -> None:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        self._actors, self._runs = [], []
        for spec in specs:
            where = PlacementGroupSchedulingStrategy(placed, placement_group_bundle_index=spec.rank)
            options = {"num_cpus": 0, "num_gpus": num_gpus / SHARE_OF_GPU, "max_restarts": 0}
            actor = ray.remote(RankActor).options(scheduling_strategy=where, **options).remote()
            self._actors.append(actor)
            self._runs.append(actor.run.remote(spec, list(code), max(1, int(num_cpus))))

    def check(self) -> None:
        """Raise what ended an actor that should run.

        Raises:
            ServingError: It died.
        """
        import ray

        ended, _ = ray.wait(self._runs, num_returns=len(self._runs), timeout=0)
        for run in ended:
            try:
                ray.get(run)
            except ray.exceptions.RayError as error:
                cause = getattr(error, "cause", None)
                if isinstance(cause, EaglerayError):
                    raise cause from None
                raise ServingError(f"rank {self._runs.index(run)} died: {error}") from None

    def end(self) -> None:
        """End those that are left."""
        import ray

        with suppress(Exception):
            ray.wait(self._runs, num_returns=len(self._runs), timeout=END_TIMEOUT_S)
        for actor in self._actors:
            with suppress(Exception):
                ray.kill(actor)


class RankActor:
    """One rank's process; it ends with the one that leads, whose connection it reads."""

    def run(self, spec: RankSpec, code: Sequence[str], num_threads: int) -> None:
        """Be the rank until the leader is gone."""
        import torch

        from eagleray.engine.group import run_rank
        from eagleray.user_code import add_code

        add_code(directory for directory in code if Path(directory).is_dir())
        torch.set_num_threads(num_threads)
        run_rank(spec)
