"""How many replicas a model needs, from the tokens that it has yet to answer.

Serve pickles this module by value and runs it in its controller, where no package of ours may be installed: it
imports nothing but the standard library, and Ray where it runs.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

METRIC = "queued_tokens"
# Fewer replicas are enough once they would be this full: else the next request brings the last one back.
SLACK = 0.8
KEY_PREFIX = b"eagleray:scaling:"
PUBLISH_EVERY_S = 1.0


@dataclass(frozen=True)
class Load:
    """What is known of a model when its replicas are counted.

    Attributes:
        queued_tokens: Tokens that wait or are in work, over all replicas.
        ongoing_requests: Requests that wait for a replica or are in one.
        running_replicas: Replicas that answer.
        target_replicas: Replicas that were last decided on.
    """

    queued_tokens: float
    ongoing_requests: float
    running_replicas: int
    target_replicas: int


def wanted_replicas(load: Load, target_queued_tokens: float) -> int:
    """Return the number of replicas that a load needs; bounds and delays are applied to it afterwards.

    Args:
        load: The load.
        target_queued_tokens: Tokens per replica to aim at.
    """
    if load.running_replicas == 0:
        # Nobody could report tokens. Whoever waits is a reason for one; what was decided on is still starting.
        return max(load.target_replicas, 1 if load.ongoing_requests > 0 else 0)
    at_least = 1 if load.ongoing_requests > 0 or load.queued_tokens > 0 else 0
    more = math.ceil(load.queued_tokens / target_queued_tokens)
    if more > load.target_replicas:
        return more
    fewer = math.ceil(load.queued_tokens / (SLACK * target_queued_tokens))
    return max(at_least, min(load.target_replicas, fewer))


class TokenPolicy:
    """Serve's policy of a model's deployment.

    Args:
        target_queued_tokens: Tokens per replica to aim at.
        clock: Seconds, monotonic.
        publish: Where the decision is shown; None: in Ray's own store of keys, where `read_decision` finds it.
    """

    def __init__(
        self,
        target_queued_tokens: float,
        clock: Callable[[], float] = time.monotonic,
        publish: Callable[[bytes, bytes], None] | None = None,
    ) -> None:
        self._target_queued_tokens = target_queued_tokens
        self._clock = clock
        self._publish = publish or put_key
        self._shown: tuple[Any, float] | None = None

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        """Return the wanted number of replicas, and no state of ours."""
        reported = (context.aggregated_metrics or {}).get(METRIC, {})
        load = Load(
            queued_tokens=float(sum(reported.values())),
            ongoing_requests=float(context.total_num_requests),
            running_replicas=context.current_num_replicas,
            target_replicas=context.target_num_replicas,
        )
        wanted = wanted_replicas(load, self._target_queued_tokens)
        self._show(context.app_name, load, wanted)
        return wanted, {}

    def _show(self, application: str, load: Load, wanted: int) -> None:
        counts = (wanted, load.running_replicas, load.target_replicas)
        now = self._clock()
        if self._shown is not None and self._shown[0] == counts and now - self._shown[1] < PUBLISH_EVERY_S:
            return
        self._shown = (counts, now)
        decision = {
            **{name: round(value) for name, value in asdict(load).items()},
            "wanted_replicas": wanted,
            "target_queued_tokens": self._target_queued_tokens,
        }
        self._publish(KEY_PREFIX + application.encode(), json.dumps(decision).encode())


def put_key(key: bytes, value: bytes) -> None:
    """Write into the cluster's store of keys; whoever cannot must decide all the same."""
    try:
        from ray.experimental.internal_kv import _internal_kv_put

        _internal_kv_put(key, value, overwrite=True)
    except Exception:
        return


def read_decision(application: str) -> dict[str, Any] | None:
    """Return what the policy of an application last saw and wanted; None where it has not run."""
    from ray.experimental.internal_kv import _internal_kv_get

    found = _internal_kv_get(KEY_PREFIX + application.encode())
    return None if found is None else json.loads(found)
