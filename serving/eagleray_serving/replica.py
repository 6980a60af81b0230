"""One model replica: it opens the checkpoint, verifies it, warms up, and is its own ingress."""

from __future__ import annotations

import asyncio
import io
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response

from eagleray.config.schema import ServeConfig
from eagleray.engine import (
    Batcher,
    Engine,
    ItemError,
    ModelThread,
    Prepared,
    load_engine,
)
from eagleray.errors import ModelStoppedError, ServingError
from eagleray.store.objects import ObjectStore
from eagleray.store.registry import Registry
from eagleray.user_code import add_code
from eagleray_serving.loopback import keep_on_loopback
from eagleray_serving.plan import ModelPlan, check
from eagleray_serving.schema import InputKind, WireError
from eagleray_serving.service import Answered, ItemFailure, ModelService

logger = logging.getLogger(__name__)

WARM_UP_TEXT = "6 July 2011"
MAX_REASON_CHARACTERS = 200


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

    async def hand_on(self, body: bytes) -> Response:
        """Answer a request that reached the edge first."""
        return await self._service.respond(body)


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


class BatchedEngine:
    """An engine behind admission and a batcher, as a service wants it.

    Args:
        engine: The loaded model.
        serve: The file's `serve` section.
    """

    def __init__(self, engine: Engine, serve: ServeConfig) -> None:
        self._engine = engine
        self._max_queued_tokens = serve.max_queued_tokens
        self._defaults = {"num_beams": serve.num_beams} if engine.summary.route == "translate" else {}
        # Two threads, one each: a tokenizer and a model may run side by side, but neither beside itself.
        self._preparing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="eagleray-prepare")
        self._batcher = Batcher[Prepared, Any](ModelThread(engine.run), engine.limits)
        self._num_preparing = 0

    async def answer(self, items: Sequence[Mapping[str, Any]], options: Mapping[str, Any]) -> list[Answered]:
        """Answer each item for itself, in order.

        Raises:
            WireError: 429, too much is waiting; 503, the replica is being stopped.
        """
        # Every item has a token at least; how many more is known once it is prepared.
        self._admit(len(items) + self._num_preparing)
        prepared = await self._prepare(items)
        self._admit(sum(item.num_tokens for item in prepared if isinstance(item, Prepared)))
        options = {**self._defaults, **options}
        return list(await asyncio.gather(*(self._run(item, options) for item in prepared)))

    def _admit(self, num_tokens: int) -> None:
        waiting = self._batcher.num_queued_tokens
        # A request that is larger than the budget alone is admitted when nothing waits: else it never would be.
        if waiting and waiting + num_tokens > self._max_queued_tokens:
            raise WireError(
                429,
                "overloaded",
                f"{waiting} tokens are waiting; the limit is {self._max_queued_tokens}",
                "try again later, or raise serve.autoscaling_config.max_replicas",
                retry_after_s=1,
            )

    async def _prepare(self, items: Sequence[Mapping[str, Any]]) -> list[Prepared | ItemError]:
        self._num_preparing += len(items)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._preparing, lambda: [_prepare(self._engine, item) for item in items]
            )
        finally:
            self._num_preparing -= len(items)

    async def _run(self, item: Prepared | ItemError, options: Mapping[str, Any]) -> Answered:
        answer: Any = item
        if isinstance(item, Prepared):
            try:
                answer = await self._batcher.submit(item, num_tokens=item.num_tokens, options=options)
            except ModelStoppedError as error:
                raise WireError(503, "unavailable", error.message, error.hint, retry_after_s=1) from None
        if isinstance(answer, ItemError):
            return ItemFailure(answer.code, answer.message, answer.hint)
        return answer  # type: ignore[no-any-return]


def _prepare(engine: Engine, item: Mapping[str, Any]) -> Prepared | ItemError:
    try:
        return engine.prepare(item)
    except Exception as error:
        # Our own tasks raise DataError; a user's raises what it likes when an item is not what it expects.
        logger.warning("%s cannot encode an item", engine.summary.ref, exc_info=True)
        reason = f"{type(error).__name__}: {error}"[:MAX_REASON_CHARACTERS]
        return ItemError("invalid_item", f"the task cannot use this item: {reason}", "look at its input columns")


def _blank_image() -> bytes:
    from PIL import Image

    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "PNG")
    return stream.getvalue()
