"""One model replica: it loads a version and is its own ingress."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.responses import Response

from eagleray_serving.answering import Asking
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.gate import Gate
from eagleray_serving.loading import load
from eagleray_serving.loopback import keep_on_loopback
from eagleray_serving.plan import ModelPlan
from eagleray_serving.service import ModelService
from eagleray_serving.versions import Versions


class ModelReplica:
    """A Serve deployment's class: one model, one process.

    Args:
        plan: What it serves.
    """

    def __init__(self, plan: ModelPlan) -> None:
        keep_on_loopback()
        first = BatchedEngine(load(plan, plan.card.ref), plan.serve)
        self._versions = Versions(first, plan.serve.request_timeout_s)
        gate = Gate(max_header_bytes=plan.serve.max_header_bytes, returns_ids=False)
        self._service = ModelService(plan.card, plan.columns, self._versions, plan.serve, gate)

    def __serve_build_asgi_app__(self) -> Starlette:
        """Return the application that answers this replica's HTTP requests."""
        return self._service.application()

    async def hand_on(self, body: bytes, asking: Asking) -> Response:
        """Answer a request that reached the edge first."""
        return await self._service.respond(body, asking)
