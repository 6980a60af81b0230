"""What stands before every application: ids, header limits, keys, rates, the access log and the counters.

Every process that answers HTTP has one gate: keys hold on a replica's own port as well as behind the front.
"""

from __future__ import annotations

import atexit
import base64
import binascii
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from starlette.datastructures import Headers
from starlette.types import Scope

from eagleray_serving.access_log import AccessLog
from eagleray_serving.answering import Asking
from eagleray_serving.keys import ApiKey, KeyFile, KeyRing
from eagleray_serving.metrics import Metrics
from eagleray_serving.page import ASSET_PATHS
from eagleray_serving.protection import Protection
from eagleray_serving.rates import Rates
from eagleray_serving.schema import WireError
from eagleray_serving.visits import Usage, Visit, current_visit, enter

logger = logging.getLogger(__name__)

# How often keys are looked at again and the access log is written.
TICK_S = 0.5
# What answers without a key: whether the server lives says nothing about what it serves.
# The page asks for a key itself.
OPEN_PATHS = frozenset({"/", "/healthz", "/readyz", *ASSET_PATHS})
# Of other clients' dialects, those that carry the key in their body: whoever reads it calls `Gate.identify`.
BODY_KEY_PATHS = frozenset({"/translate", "/detect"})
BROWSER_PATHS = frozenset({"/docs", "/openapi.json"})
SCHEMES = ("bearer", "deepl-auth-key")


class Gate:
    """The gate of one process.

    Args:
        protection: What the server was told.
        max_header_bytes: Largest request line and headers.
        returns_ids: Whether answers get their `X-Request-Id` here; Serve adds it to whatever it runs.
        owner_sha256: Hash of the token with which the server's owner commands it: one more key, for everything.

    Raises:
        ServingError: The keys cannot be read.
    """

    def __init__(
        self,
        protection: Protection | None = None,
        *,
        max_header_bytes: int = 16_384,
        returns_ids: bool = True,
        owner_sha256: str | None = None,
    ) -> None:
        protection = protection or Protection()
        self.max_header_bytes = max_header_bytes
        self.returns_ids = returns_ids
        self.ring = KeyRing(None if protection.keys is None else KeyFile(Path(protection.keys)), owner_sha256)
        self.rates = Rates()
        self.metrics = Metrics()
        log = None if protection.access_log is None else Path(protection.access_log)
        self.log = AccessLog(log, has_addresses=protection.has_addresses)

    def watch(self, report: Callable[[], None] = lambda: None) -> None:
        """Follow the keys, write the log and report, in a thread that ends with the process."""
        atexit.register(self.log.flush)
        threading.Thread(target=self._watch, args=(report,), name="eagleray-gate", daemon=True).start()

    def _watch(self, report: Callable[[], None]) -> None:
        while True:
            for step in (self.ring.follow, self.log.flush, report):
                try:
                    step()
                except Exception:
                    # Whatever it was: keys must go on being followed.
                    logger.exception("the gate's thread failed, and goes on")
            time.sleep(TICK_S)

    def authenticate(self, scope: Scope, headers: Headers) -> ApiKey | None:
        """Return the key of a request; None where it needs none.

        Raises:
            WireError: 401, it has none or another's.
        """
        if not self.ring.is_asked:
            return None
        given = key_of(headers)
        key = None if given is None else self.ring.find(given)
        is_later = given is None and scope["path"] in BODY_KEY_PATHS
        if key is None and not is_later and scope["path"] not in OPEN_PATHS:
            raise unauthorized(given is not None, is_browser=scope["path"] in BROWSER_PATHS)
        return key

    def identify(self, given: str | None) -> None:
        """Take a key that the current visit carries in its body.

        Raises:
            WireError: 401, it is none of ours.
        """
        visit = current_visit()
        if visit is None or visit.key is not None or not self.ring.is_asked:
            return
        visit.key = None if given is None else self.ring.find(given)
        if visit.key is None:
            raise unauthorized(given is not None)

    def admit(self, scope: str) -> None:
        """Let the current visit use a model, where its key may and has tokens left.

        Args:
            scope: What it uses: a verb and a model, as in `translate/en-fr`.

        Raises:
            WireError: 401, 403 or 429.
        """
        visit = current_visit()
        if visit is None:
            return  # behind a handle: asked where it entered
        if visit.key is None and self.ring.is_asked:
            raise unauthorized(False)
        visit.require(scope)
        if not visit.is_admitted:
            self.rates.admit(visit.key)
            visit.is_admitted = True

    def charge(self, usage: Usage, asking: Asking) -> None:
        """Account for what a model did, here or behind a handle."""
        visit = current_visit()
        if visit is not None:
            visit.used.append(usage)
        self.charge_rate(asking, usage.num_tokens)

    def charge_rate(self, asking: Asking, num_tokens: int) -> None:
        """Take tokens from the key that asks, without an account of them."""
        self.rates.charge(self.ring.named(asking.key), num_tokens)

    def readmit(self, asking: Asking) -> Visit:
        """Begin the visit of a request that another process let in and handed over."""
        visit = Visit(asking.request_id, self.ring.named(asking.key), is_admitted=True)
        enter(visit)
        return visit

    def leave(self, visit: Visit, method: str, route: str, status: int, address: str | None) -> None:
        """Take note of a request that was answered."""
        self.metrics.count_request(route, method, status, time.monotonic() - visit.began)
        self.log.add(visit, method, route, status, address)


def signed(asking: Asking) -> Asking:
    """Return what is asked with the name of the key that asks."""
    visit = current_visit()
    return asking if visit is None or visit.key is None else replace(asking, key=visit.key.name)


def key_of(headers: Headers) -> str | None:
    """Return the key that a request carries.

    `Authorization: Bearer KEY`, as most clients send it; DeepL's own scheme; the password of HTTP's basic
    authentication, which browsers and Prometheus know; or the header `X-API-Key`.
    """
    scheme, _, rest = headers.get("authorization", "").partition(" ")
    scheme, rest = scheme.lower(), rest.strip()
    if scheme in SCHEMES and rest:
        return rest
    if scheme == "basic":
        try:
            return base64.b64decode(rest, validate=True).decode().partition(":")[2] or None
        except (binascii.Error, ValueError):
            return None
    return headers.get("x-api-key") or None


def unauthorized(is_wrong: bool, *, is_browser: bool = False) -> WireError:
    """Return the answer to a request without a key, or with one that is none of ours."""
    return WireError(
        401,
        "unauthorized",
        "this key is not known here" if is_wrong else "a key is needed",
        "send `Authorization: Bearer KEY`; the operator makes keys with: eagleray keys add NAME",
        # A browser asks its user for a password where it sees this scheme: wanted for a page, not behind a page.
        challenge='Basic realm="eagleray"' if is_browser else 'Bearer realm="eagleray"',
    )
