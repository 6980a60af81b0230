"""Plans as Serve applications, and the edge's way to them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from starlette.responses import Response

from eagleray_serving.answering import Answers, Asking
from eagleray_serving.autoscaling import LOGGING, deployment_options
from eagleray_serving.board import RayNotes
from eagleray_serving.bulk import Item, ReplicaDiedError
from eagleray_serving.bulk_service import BulkService
from eagleray_serving.control import Control
from eagleray_serving.edge import READY, Edge
from eagleray_serving.edge_handle import Head, Used, in_pieces
from eagleray_serving.gate import Gate
from eagleray_serving.loopback import keep_on_loopback
from eagleray_serving.metrics import Family
from eagleray_serving.plan import ModelPlan
from eagleray_serving.scaling import read_decision
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
# A count of replicas that is older is not used while the next one is read.
COUNT_LIFE_S = 10.0
# A request that kills its replica is handed on this often and no more.
MAX_HAND_ONS = 3


class ServeFleet:
    """The models behind the edge, through Serve's handles and status."""

    def __init__(self, plans: Sequence[ModelPlan]) -> None:
        self._plans = {plan.card.name: plan for plan in plans}
        self._handles: dict[str, Any] = {}
        self._states: dict[str, str] = {}
        self._replicas: dict[str, Mapping[str, Any]] = {}
        self._read_at: float | None = None
        self._reading = asyncio.Lock()
        self._reading_ahead: asyncio.Task[None] | None = None

    async def states(self) -> Mapping[str, str]:
        """Return the state of each model; read again after a second."""
        await self._refresh()
        return self._states

    async def count_replicas(self, name: str) -> int:
        """Return how many replicas of a model run: the last count, while the next one is read.

        Chunks wait for the answer, and Serve's controller may take as long as one of them, or be started again.
        """
        if self._reading_ahead is None or self._reading_ahead.done():
            self._reading_ahead = asyncio.get_running_loop().create_task(self._read_ahead())
        if self._read_at is None or time.monotonic() - self._read_at > COUNT_LIFE_S:
            await asyncio.shield(self._reading_ahead)
        return int(self._replicas.get(name, {}).get("running", 0))

    async def _read_ahead(self) -> None:
        from ray.exceptions import RayError

        with suppress(RayError):
            await self._refresh()

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        """Return how many replicas of each model run, and what autoscaling last saw and wanted."""
        await self._refresh()
        return self._replicas

    async def _refresh(self) -> None:
        async with self._reading:
            if self._read_at is None or time.monotonic() - self._read_at > STATES_LIFE_S:
                await asyncio.to_thread(self._read)
                self._read_at = time.monotonic()

    def _read(self) -> None:
        from ray import serve

        applications = serve.status().applications
        found = {
            name: applications[plan.application]
            for name, plan in self._plans.items()
            if plan.application in applications
        }
        self._states = {name: STATES.get(str(each.status.value), "unknown") for name, each in found.items()}
        self._replicas = {name: _replicas(self._plans[name], each) for name, each in found.items()}

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

    async def ask(
        self,
        name: str,
        items: Sequence[Item],
        options: Mapping[str, Any],
        asking: Asking,
        waiting_tokens: int,
    ) -> Answers:
        """Let a replica of a model answer a chunk; Serve takes the one with the fewest of ours.

        Raises:
            ReplicaDiedError: It is gone.
            WireError: It refuses; 503, there is none.
        """
        from ray.exceptions import RayError, RayTaskError
        from ray.serve.exceptions import RayServeException

        handle = await self._handle(self._plans[name])
        response = handle.answer.remote(items, options, asking, waiting_tokens)
        try:
            found: Answers | WireError = await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except RayTaskError:
            raise  # our own fault, with its traceback
        except RayError as error:
            raise ReplicaDiedError(type(error).__name__) from error
        except RayServeException as error:
            raise WireError(503, "unavailable", f"no replica of {name} answers", retry_after_s=1) from error
        if isinstance(found, WireError):
            raise found
        return found

    async def _handle(self, plan: ModelPlan) -> Any:
        from ray import serve

        if plan.card.name not in self._handles:
            self._handles[plan.card.name] = await asyncio.to_thread(serve.get_app_handle, plan.application)
        return self._handles[plan.card.name]


def _replicas(plan: ModelPlan, application: Any) -> dict[str, Any]:
    states = application.deployments[MODEL_DEPLOYMENT].replica_states if application.deployments else {}
    counts = {state.value if hasattr(state, "value") else str(state): count for state, count in states.items()}
    shown: dict[str, Any] = {"running": counts.get("RUNNING", 0), "starting": counts.get("STARTING", 0)}
    if plan.serve.num_replicas == "auto":
        shown["autoscaling"] = read_decision(plan.application)
    return shown


class EdgeReplica:
    """The Serve deployment's class of the application at `/`."""

    def __init__(self, plans: Sequence[ModelPlan], token_sha256: str | None = None) -> None:
        keep_on_loopback()
        self._control = Control(plans, RayNotes(), token_sha256)
        self._controlling = asyncio.get_running_loop().create_task(self._control.run())
        limits = [plan.serve for plan in plans]
        fleet = ServeFleet(plans)
        gate = Gate(
            plans[0].protection,
            max_header_bytes=max(each.max_header_bytes for each in limits),
            returns_ids=False,
            owner_sha256=token_sha256,
        )
        gate.watch()
        self._gate = gate
        self._edge = Edge(
            [plan.card for plan in plans],
            fleet,
            max_body_bytes=max(each.max_body_bytes for each in limits),
            body_timeout_s=max(each.request_timeout_s for each in limits),
            versions=self._control.views,
            gate=gate,
            bulk={plan.card.name: _bulk_service(plan, fleet, gate) for plan in plans},
        )

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Return the application that answers this replica's HTTP requests."""
        app = self._edge.application()
        app.router.routes.extend(self._control.routes())
        return app

    async def spread(
        self, name: str, body: bytes, asking: Asking, lines: bool
    ) -> AsyncGenerator[Head | bytes | Used, None]:
        """Answer a large request that reached a replica first; the last piece is what it took."""
        visit = self._gate.readmit(asking)
        response = await self._edge.spread(name, body, asking, lines=lines)
        async for piece in in_pieces(response):
            yield piece
        yield Used(tuple(visit.used))

    async def report(self, model: str, replica: str, families: list[Family]) -> int:
        """Take what a replica counted; returns how many replicas of its model run."""
        return self._edge.reports.take(model, replica, families)


def _bulk_service(plan: ModelPlan, fleet: ServeFleet, gate: Gate) -> BulkService:
    name = plan.card.name
    ask, count_replicas = partial(fleet.ask, name), partial(fleet.count_replicas, name)
    return BulkService(plan.card, plan.columns, plan.serve, ask, count_replicas, gate)


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
        num_replicas=1, max_ongoing_requests=1000, ray_actor_options=actor, logging_config=dict(LOGGING)
    ).bind(list(plans), token_sha256)
    return application


def build_model(args: dict[str, Any]) -> ServeApplication:
    """Build a model's application from a Serve config (`serve render`)."""
    return model_application(ModelPlan.from_args(args))


def build_edge(args: dict[str, Any]) -> ServeApplication:
    """Build the edge's application from a Serve config (`serve render`)."""
    return edge_application(
        [ModelPlan.from_args(each) for each in args["models"]], token_sha256=args.get("token_sha256")
    )
