"""The controllers of a server's models, and the routes by which its owner commands them.

The routes are on the front, like all others, so they ask for a secret: the token that `serve` leaves in the user's
own folder when it starts, or a key with the scope `admin`. The server knows their hashes alone.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from eagleray.errors import EaglerayError, NotFoundError, UsageError
from eagleray_serving.board import Board, Notes
from eagleray_serving.controller import Controller
from eagleray_serving.keys import ADMIN
from eagleray_serving.plan import ModelPlan
from eagleray_serving.schema import WireError, parse_json
from eagleray_serving.visits import current_visit
from eagleray_serving.web import read_body

logger = logging.getLogger(__name__)

STEP_S = 1.0
MAX_BODY_BYTES = 10_000
BODY_TIMEOUT_S = 10.0


class CanaryRequest(BaseModel):
    """The body of `POST /v1/models/<name>/canary`."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    ref: str = Field(min_length=1, max_length=300)
    percent: float = Field(10.0, gt=0, le=100)


class Control:
    """What decides the versions of all models of a server.

    Args:
        plans: The models.
        notes: What the processes of the server share.
        token_sha256: Hash of the token that commands must carry, in hex; None: this server takes none.
    """

    def __init__(self, plans: Sequence[ModelPlan], notes: Notes, token_sha256: str | None = None) -> None:
        self._controllers = {
            plan.card.name: Controller(plan, Board(notes, plan.server, plan.card.name)) for plan in plans
        }
        self._token_sha256 = token_sha256

    async def run(self) -> None:
        """Decide for good; each model for itself, since a store that does not answer is one model's."""
        await asyncio.gather(*(_decide(name, controller) for name, controller in self._controllers.items()))

    def views(self) -> Mapping[str, Mapping[str, Any]]:
        """Return what is known of each model's versions."""
        return {
            name: {**controller.view(), "scores": controller.scores()}
            for name, controller in self._controllers.items()
        }

    def routes(self) -> list[Route]:
        """Return the routes of commands."""
        commands = {"canary": self._canary, "promote": self._promote, "rollback": self._roll_back}
        return [
            Route(f"/v1/models/{{model}}/{name}", self._guarded(command), methods=["POST"])
            for name, command in commands.items()
        ]

    def _guarded(self, command: Callable[[Controller, bytes], str]) -> Callable[[Request], Any]:
        async def endpoint(request: Request) -> Response:
            self._check_token(request)
            name = request.path_params["model"]
            controller = self._controllers.get(name)
            if controller is None:
                known = ", ".join(self._controllers)
                raise WireError(404, "unknown_model", "there is no model of this name here", f"there are {known}")
            body = await read_body(request, MAX_BODY_BYTES, BODY_TIMEOUT_S)
            try:
                version = await asyncio.to_thread(command, controller, body)
            except EaglerayError as error:
                raise WireError(_status(error), error.code, error.message, error.hint) from None
            return JSONResponse({"model": name, "version": version, "rollout": controller.view()})

        return endpoint

    def _check_token(self, request: Request) -> None:
        visit = current_visit()
        if visit is not None and visit.key is not None:
            visit.require(ADMIN)  # the owner's token is one of the server's keys, where it has keys
            return
        if self._token_sha256 is None:
            raise WireError(
                403, "no_commands", "this server takes no commands", "let it follow an alias: serve.follow"
            )
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        found = hashlib.sha256(token.strip().encode()).hexdigest()
        if scheme.lower() != "bearer" or not hmac.compare_digest(found, self._token_sha256):
            raise WireError(
                401, "unauthorized", "commands need this server's token", "eagleray serve canary sends it"
            )

    def _canary(self, controller: Controller, body: bytes) -> str:
        try:
            asked = CanaryRequest.model_validate(parse_json(body))
        except ValidationError as error:
            first = error.errors(include_input=False)[0]
            where = ".".join(str(part) for part in first["loc"]) or "body"
            raise WireError(422, "invalid_request", f"{where}: {first['msg']}", "send ref and percent") from None
        return controller.canary(asked.ref, asked.percent)

    def _promote(self, controller: Controller, body: bytes) -> str:
        return controller.promote()

    def _roll_back(self, controller: Controller, body: bytes) -> str:
        return controller.roll_back()


async def _decide(name: str, controller: Controller) -> None:
    failing = False
    while True:
        try:
            await asyncio.to_thread(controller.step)
            failing = False
        except Exception:
            # What is served stays as it is; the reason is told once.
            if not failing:
                logger.warning("the versions of %s are not looked after", name, exc_info=True)
            failing = True
        await asyncio.sleep(STEP_S)


def _status(error: EaglerayError) -> int:
    if isinstance(error, NotFoundError):
        return 404
    return 409 if isinstance(error, UsageError) else 422
