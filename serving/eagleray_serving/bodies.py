"""Large bodies: how many of them one application holds at once."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import Request

from eagleray_serving import haproxy_launcher
from eagleray_serving.admission import overloaded

# The front sends bodies above this to the edge, whichever model they are for: it could not send them a second time
# when a replica dies, and so the edge does.
LARGE_BODY_BYTES = haproxy_launcher.LARGE_BODY_BYTES
MAX_LARGE_BODIES = 16


class LargeBodies:
    """Bounds the memory that bodies take: a large one needs a place before it is read."""

    def __init__(self) -> None:
        self.num_held = 0

    @contextmanager
    def place(self, request: Request) -> Iterator[None]:
        """Hold a place for the body of a request, if it is large.

        Raises:
            WireError: 429, all places are taken.
        """
        length = request.headers.get("content-length", "0" if request.method == "GET" else "")
        is_large = not length.isdecimal() or int(length) > LARGE_BODY_BYTES
        if is_large and self.num_held >= MAX_LARGE_BODIES:
            raise overloaded(f"{MAX_LARGE_BODIES} large requests are held already", 5)
        self.num_held += is_large
        try:
            yield
        finally:
            self.num_held -= is_large
