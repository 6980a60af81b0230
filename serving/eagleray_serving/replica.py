"""One model replica: it loads a version and is its own ingress."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from starlette.applications import Starlette
from starlette.responses import Response

from eagleray.errors import ModelStuckError
from eagleray_serving.admission import HeldBack
from eagleray_serving.answering import Answers, Asking
from eagleray_serving.board import RayNotes
from eagleray_serving.edge_handle import EdgeHandle
from eagleray_serving.gate import Gate
from eagleray_serving.loopback import keep_on_loopback
from eagleray_serving.plan import ModelPlan
from eagleray_serving.reporting import Reporter, replica_id
from eagleray_serving.scaling import METRIC
from eagleray_serving.schema import WireError
from eagleray_serving.service import ModelService

logger = logging.getLogger(__name__)


class ModelReplica:
    """A Serve deployment's class: one model, one process.

    Args:
        plan: What it serves.
    """

    def __init__(self, plan: ModelPlan) -> None:
        # Not at the top: the command that deploys this class does without torch.
        from eagleray_serving.version_loading import hold_versions

        keep_on_loopback()
        gate = Gate(plan.protection, max_header_bytes=plan.serve.max_header_bytes, returns_ids=False)
        self._versions, follower = hold_versions(plan, replica_id(), RayNotes(), gate.metrics.count_batch)
        # The loop keeps no reference to a task that nobody awaits.
        self._following = asyncio.get_running_loop().create_task(follower.run())
        gate.metrics.watch_queue(lambda: self._versions.num_queued_tokens)
        self._held_back = HeldBack()
        hand_over = EdgeHandle(plan).hand_over
        self._service = ModelService(plan.card, plan.columns, self._versions, plan.serve, gate, hand_over)
        gate.watch(Reporter(gate, plan.card.name, replica_id()))

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the application that answers this replica's HTTP requests."""
        return self._service.application()

    async def hand_on(self, body: bytes, asking: Asking) -> Response:
        """Answer a request that reached the edge first."""
        return await self._service.respond(body, asking)

    async def check_health(self) -> None:
        """Say nothing while this replica can answer; Serve asks every two seconds, and replaces one that objects.

        Raises:
            ModelStuckError: A model hangs, or what drives it has ended.
        """
        if (trouble := self._versions.trouble) is not None:
            logger.error("this replica is to be replaced: %s", trouble)
            raise ModelStuckError(trouble, "the replica is replaced; its requests go elsewhere")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Return what this replica has yet to answer; Serve calls it for `scaling.TokenPolicy`."""
        return {METRIC: float(self._versions.num_tokens + self._held_back.num_tokens)}

    async def answer(
        self,
        items: Sequence[Mapping[str, Any]],
        options: Mapping[str, Any],
        asking: Asking,
        waiting_tokens: int,
    ) -> Answers | WireError:
        """Answer a chunk of a large request that the edge has checked; a refusal is returned, not raised.

        Args:
            items: The chunk.
            options: Options of the request.
            asking: Who asks.
            waiting_tokens: This replica's share of what the request still holds back.
        """
        self._held_back.tell(asking.request_id, waiting_tokens)
        try:
            answers = await self._versions.answer(items, options, asking)
        except WireError as error:
            return error
        # The edge keeps the account; here, what the key may use by this replica gets less.
        self._service.gate.charge_rate(asking, answers.num_tokens)
        return answers
