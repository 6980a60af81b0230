"""Plans as Serve applications, and the edge's way to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import Response

from eagleray_serving.answering import Asking
from eagleray_serving.autoscaling import deployment_options
from eagleray_serving.board import RayNotes
from eagleray_serving.control import Control
from eagleray_serving.edge import READY, Edge
from eagleray_serving.gate import Gate
from eagleray_serving.loopback import keep_on_loopback
from eagleray_serving.metrics import Family
from eagleray_serving.plan import ModelPlan
from eagleray_serving.schema import WireError

if TYPE_CHECKING:
    from ray.serve import Application as ServeApplication

MODEL_DEPLOYMENT = "Model"
EDGE_DEPLOYMENT = "Edge"
# Serve's words for what a model is doing, in ours.
STATES = {
    "RUNNING": READY,
    "DEPLOYING": "starting",
    "NOT_STARTED": "starting",
    "DEPLOY_FAILED": "failed",
    "UNHEALTHY": "unhealthy",
    "DELETING": "stopping",
}
STATES_LIFE_S = 1.0
# A request that kills its replica is handed on this often and no more.
MAX_HAND_ONS = 3


class ServeFleet:
    """The models behind the edge, through Serve's handles and status."""

    def __init__(self, plans: Sequence[ModelPlan]) -> None:
        self._plans = {plan.card.name: plan for plan in plans}
        self._handles: dict[str, Any] = {}
        self._states: dict[str, str] = {}
        self._read_at: float | None = None

    async def states(self) -> Mapping[str, str]:
        """Return the state of each model; read again after a second."""
        if self._read_at is None or time.monotonic() - self._read_at > STATES_LIFE_S:
            self._states = await asyncio.to_thread(self._read_states)
            self._read_at = time.monotonic()
        return self._states

    def _read_states(self) -> dict[str, str]:
        from ray import serve

        applications = serve.status().applications
        return {
            name: STATES.get(str(applications[plan.application].status.value), "unknown")
            for name, plan in self._plans.items()
            if plan.application in applications
        }

    async def hand_on(self, name: str, body: bytes, asking: Asking) -> Response:
        """Let a replica of a model answer; when it dies on the way, another one.

        Raises:
            WireError: 503, none answered.
        """
        from ray.exceptions import RayActorError
        from ray.serve.exceptions import RayServeException

        plan = self._plans[name]
        handle = await self._handle(plan)
        try:
            async with asyncio.timeout(plan.serve.request_timeout_s):
                for _ in range(MAX_HAND_ONS):
                    try:
                        response: Response = await handle.hand_on.remote(body, asking)
                        return response
                    except RayActorError:
                        continue
        except (TimeoutError, RayServeException):
            pass
        raise WireError(
            503, "unavailable", f"no replica of {name} answered", "try again", retry_after_s=1
        ) from None

    async def _handle(self, plan: ModelPlan) -> Any:
        from ray import serve

        if plan.card.name not in self._handles:
            self._handles[plan.card.name] = await asyncio.to_thread(serve.get_app_handle, plan.application)
        return self._handles[plan.card.name]


class EdgeReplica:
    """The Serve deployment's class of the application at `/`."""

    def __init__(self, plans: Sequence[ModelPlan], token_sha256: str | None = None) -> None:
        keep_on_loopback()
        self._control = Control(plans, RayNotes(), token_sha256)
        self._controlling = asyncio.get_running_loop().create_task(self._control.run())
        limits = [plan.serve for plan in plans]
        gate = Gate(
            plans[0].protection,
            max_header_bytes=max(each.max_header_bytes for each in limits),
            returns_ids=False,
            owner_sha256=token_sha256,
        )
        gate.watch()
        self._edge = Edge(
            [plan.card for plan in plans],
            ServeFleet(plans),
            max_body_bytes=max(each.max_body_bytes for each in limits),
            body_timeout_s=max(each.request_timeout_s for each in limits),
            gate=gate,
            versions=self._control.views,
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that answers this replica's HTTP requests."""
        app = self._edge.application()
        app.router.routes.extend(self._control.routes())
        return app

    async def report(self, model: str, replica: str, families: list[Family]) -> int:
        """Take what a replica counted; returns how many replicas of its model run."""
        return self._edge.reports.take(model, replica, families)


def model_application(plan: ModelPlan, runtime_env: Mapping[str, Any] | None = None) -> ServeApplication:
    """Return the Serve application of a model; its ingress is the replica itself."""
    from ray import serve

    from eagleray_serving.replica import ModelReplica

    options = deployment_options(plan.serve)
    if runtime_env is not None:
        options["ray_actor_options"] = {**options["ray_actor_options"], "runtime_env": dict(runtime_env)}
    deployment = serve.deployment(serve.ingress()(ModelReplica), name=MODEL_DEPLOYMENT)
    application: ServeApplication = deployment.options(**options).bind(plan)
    return application


def edge_application(
    plans: Sequence[ModelPlan], runtime_env: Mapping[str, Any] | None = None, token_sha256: str | None = None
) -> ServeApplication:
    """Return the Serve application at `/`."""
    from ray import serve

    actor: dict[str, Any] = {"num_cpus": 0}
    if runtime_env is not None:
        actor["runtime_env"] = dict(runtime_env)
    deployment = serve.deployment(serve.ingress()(EdgeReplica), name=EDGE_DEPLOYMENT)
    application: ServeApplication = deployment.options(
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options=actor
    ).bind(list(plans), token_sha256)
    return application


def build_model(args: dict[str, Any]) -> ServeApplication:
    """Build a model's application from a Serve config (`serve render`)."""
    return model_application(ModelPlan.from_args(args))


def build_edge(args: dict[str, Any]) -> ServeApplication:
    """Build the edge's application from a Serve config (`serve render`)."""
    return edge_application([ModelPlan.from_args(each) for each in args["models"]])
