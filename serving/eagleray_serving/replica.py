"""One model replica: it opens the checkpoint, verifies it, warms up, and is its own ingress."""

from __future__ import annotations

import io
import logging
from pathlib import Path

from starlette.applications import Starlette
from starlette.responses import Response

from eagleray.engine import Engine, ItemError, load_engine
from eagleray.errors import ServingError
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.user_code import add_code
from eagleray_serving.answering import Asking
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.loopback import keep_on_loopback
from eagleray_serving.plan import ModelPlan, check
from eagleray_serving.schema import InputKind
from eagleray_serving.service import ModelService

logger = logging.getLogger(__name__)

WARM_UP_TEXT = "6 July 2011"


class ModelReplica:
    """A Serve deployment's class: one model, one process.

    Args:
        plan: What it serves.
    """

    def __init__(self, plan: ModelPlan) -> None:
        keep_on_loopback()
        self._engine = BatchedEngine(load(plan), plan.serve)
        self._service = ModelService(plan.card, plan.columns, self._engine, plan.serve)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the application that answers this replica's HTTP requests."""
        return self._service.application()

    async def hand_on(self, body: bytes, asking: Asking) -> Response:
        """Answer a request that reached the edge first."""
        return await self._service.respond(body, asking)


def load(plan: ModelPlan) -> Engine:
    """Open, verify and load a checkpoint, and run it once.

    Raises:
        NotFoundError: The version is gone.
        CheckpointDamagedError: A byte of it is not what was committed.
        ServingError: The model fails on a first item.
    """
    # On a joined cluster the user's code came with the runtime environment, and the directories are elsewhere.
    add_code(directory for directory in plan.code if Path(directory).is_dir())
    checkpoint = Registry(ObjectStore.open(plan.store)).open(plan.card.ref)
    check(checkpoint)
    serve = plan.serve
    engine = load_engine(
        checkpoint,
        "cuda" if serve.ray_actor_options.num_gpus else "cpu",
        serve=serve,
    )
    warm_up(engine, plan.card.inputs)
    logger.info("%s is loaded", plan.card.ref)
    return engine


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
