"""How a replica gets at the versions of its model, and what it begins with."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

from eagleray.store.manifest import Manifest
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.board import Board, Notes
from eagleray_serving.follower import Follower, Loading
from eagleray_serving.loading import load
from eagleray_serving.plan import ModelPlan
from eagleray_serving.room import NoRoomError, no_room, one_at_a_time
from eagleray_serving.split import Split
from eagleray_serving.trial import Recorded, Recorder, check_same_kind, try_on
from eagleray_serving.versions import Loaded, Versions

OnStep = Callable[[int, int], None]


def hold_versions(
    plan: ModelPlan, replica: str, notes: Notes, on_step: OnStep = lambda num_items, num_tokens: None
) -> tuple[Versions, Follower]:
    """Load what a replica that starts now must answer with, and return what makes it follow from then on.

    Args:
        plan: What is served; its version counts only where no controller has said another one yet.
        replica: Id of the replica.
        notes: What the processes of the server share.
        on_step: Told the items and the tokens that are in work, whenever a model is put to it.

    Raises:
        NotFoundError: The version is gone.
        CheckpointDamagedError: A byte of it is not what was committed.
        ServingError: The model fails on a first item.
    """
    board, loading, recorder = Board(notes, plan.server, plan.card.name), plan_loading(plan, on_step), Recorder()
    state = board.rollout()
    current = plan.card.version if state is None else state.current
    versions = Versions(loading.alone(current, None), plan.serve.request_timeout_s, recorder)
    candidate = None if state is None else state.candidate
    if candidate is not None and candidate.is_tried:
        # A request that is sent again must not meet another version because this replica is new.
        versions.add(loading.alone(candidate.version, None))
        versions.route(Split(current, candidate.version, candidate.percent))
    return versions, Follower(replica, versions, recorder, board, loading)


def plan_loading(plan: ModelPlan, on_step: OnStep = lambda num_items, num_tokens: None) -> Loading:
    """Return how the versions of a model are loaded."""
    manifests: dict[str, Manifest] = {}

    def alone(version: str, examples: Sequence[Recorded] | None) -> Loaded:
        engine = load(plan, f"{plan.card.name}@{version}")
        try:
            check_same_kind(engine, plan.card.verb, plan.columns)
            if examples is not None:
                try_on(engine, examples)
        except BaseException:
            engine.close()
            del engine
            gc.collect()
            raise
        return BatchedEngine(engine, plan.serve, on_step)

    def beside(version: str, examples: Sequence[Recorded] | None) -> Loaded:
        if not plan.serve.rollout.load_beside:
            raise NoRoomError("serve.rollout.load_beside is false")
        if version not in manifests:
            registry = Registry(ObjectStore.open(plan.store))
            manifests[version] = registry.manifest(f"{plan.card.name}@{version}")
        with one_at_a_time():
            reason = no_room(manifests[version], gpu=plan.serve.ray_actor_options.num_gpus > 0)
            if reason is not None:
                raise NoRoomError(reason)
            return alone(version, examples)

    return Loading(beside, alone)
