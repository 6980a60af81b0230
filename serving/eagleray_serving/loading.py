"""From a reference to a model that answers: opened, verified, loaded, and run once."""

from __future__ import annotations

import io
import logging
from functools import partial
from pathlib import Path

from eagleray.engine import Engine, ItemError, load_engine
from eagleray.errors import ServingError
from eagleray.rank_actors import load_on_actors
from eagleray.store.checkpoint import Checkpoint
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.user_code import add_code
from eagleray_serving.autoscaling import num_ranks
from eagleray_serving.plan import ModelPlan, check
from eagleray_serving.schema import InputKind

logger = logging.getLogger(__name__)

WARM_UP_TEXT = "6 July 2011"


def load(plan: ModelPlan, ref: str) -> Engine:
    """Open, verify and load a version, and run it once. Whoever loads an engine closes it.

    Args:
        plan: What is served, and how.
        ref: Full reference of the version.

    Raises:
        NotFoundError: The version is gone.
        CheckpointDamagedError: A byte of it is not what was committed.
        ServingError: The model fails on a first item.
    """
    # On a joined cluster the user's code came with the runtime environment, and the directories are elsewhere.
    add_code(directory for directory in plan.code if Path(directory).is_dir())
    checkpoint = Registry(ObjectStore.open(plan.store)).open(ref)
    check(checkpoint)
    engine = _load(checkpoint, plan)
    logger.info("%s is loaded", ref)
    return engine


def _load(checkpoint: Checkpoint, plan: ModelPlan) -> Engine:
    serve, options = plan.serve, plan.serve.ray_actor_options
    try_out = partial(warm_up, inputs=plan.card.inputs)
    if num_ranks(serve) == 1:
        engine = load_engine(checkpoint, "cuda" if options.num_gpus else "cpu", serve=serve)
        try_out(engine)
        return engine
    return load_on_actors(
        checkpoint,
        serve,
        num_cpus=options.num_cpus,
        num_gpus=options.num_gpus,
        code=plan.code,
        try_out=try_out,
    )


def warm_up(engine: Engine, inputs: InputKind) -> None:
    """Answer one item, so that the first request does not pay for what happens once.

    Raises:
        ServingError: The model fails on it.
    """
    if inputs == "inputs":
        return  # what an item of a user's task looks like is not known
    value = WARM_UP_TEXT if inputs == "text" else _blank_image()
    (answer,) = engine.answer([{engine.summary.input_columns[0]: value}])
    if isinstance(answer, ItemError) and answer.code == "model_failed":
        raise ServingError(f"{engine.summary.ref} fails on a first item: {answer.message}", answer.hint)


def _blank_image() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()
