"""How a replica tells the edge what it counts, and learns how many replicas share a key's rate."""

from __future__ import annotations

import logging
import time
from typing import Any

from eagleray_serving.gate import Gate
from eagleray_serving.plan import EDGE_APPLICATION

logger = logging.getLogger(__name__)

REPORT_INTERVAL_S = 2.0
REPORT_TIMEOUT_S = 5.0


class Reporter:
    """Called again and again by the gate's thread; a report that fails is made again.

    Args:
        gate: The replica's gate.
        model: Name of the model.
        replica: Id of the replica.
    """

    def __init__(self, gate: Gate, model: str, replica: str) -> None:
        self._gate = gate
        self._model = model
        self._replica = replica
        self._handle: Any = None
        self._next_at = 0.0

    def __call__(self) -> None:
        """Report where it is time to."""
        if time.monotonic() < self._next_at:
            return
        self._next_at = time.monotonic() + REPORT_INTERVAL_S
        try:
            self._report()
        except Exception as error:
            # The edge is not there yet, or is being replaced: what is counted goes on being counted.
            logger.debug("%s could not report: %r", self._replica, error)

    def _report(self) -> None:
        from ray import serve

        if self._handle is None:
            self._handle = serve.get_app_handle(EDGE_APPLICATION)
        families = self._gate.metrics.families()
        told = self._handle.report.remote(self._model, self._replica, families)
        self._gate.rates.num_sharers = max(1, told.result(timeout_s=REPORT_TIMEOUT_S))


def replica_id() -> str:
    """Return the id that Serve gave this replica."""
    from ray import serve

    return str(serve.get_replica_context().replica_id.unique_id)
