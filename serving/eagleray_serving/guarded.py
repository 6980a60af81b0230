"""The edge's way to the models, with keys, rates and accounts on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from eagleray_serving.answering import Asking
from eagleray_serving.catalog import ModelCard
from eagleray_serving.gate import Gate, signed
from eagleray_serving.service import ModelResponse

if TYPE_CHECKING:
    from eagleray_serving.edge import Fleet


class GuardedFleet:
    """A fleet that asks whether a key may use a model, and charges it for what the model did.

    Whatever the edge offers goes through here: bare routes, bulk requests, other clients' dialects.

    Args:
        fleet: The models.
        cards: What they are.
        gate: The edge's gate.
    """

    def __init__(self, fleet: Fleet, cards: Sequence[ModelCard], gate: Gate) -> None:
        self._fleet = fleet
        self._cards = {card.name: card for card in cards}
        self._gate = gate

    async def states(self) -> Mapping[str, str]:
        """Return the state of each model."""
        return await self._fleet.states()

    async def replicas(self) -> Mapping[str, Mapping[str, Any]]:
        """Return how many replicas of each model run, and what autoscaling last saw and wanted."""
        return await self._fleet.replicas()

    async def hand_on(self, name: str, body: bytes, asking: Asking) -> Response:
        """Let a model answer a body.

        Raises:
            WireError: 403 or 429, the key may not, or not now; 503, no replica answered.
        """
        self._gate.admit(self._cards[name].scope)
        asking = signed(asking)
        response = await self._fleet.hand_on(name, body, asking)
        if isinstance(response, ModelResponse):
            self._gate.charge(response.usage, asking)
        return response
