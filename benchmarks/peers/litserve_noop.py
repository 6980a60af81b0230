"""The no-op as LitServe takes it: a module of its own, since its worker is a new process that imports it."""

from __future__ import annotations

from typing import Any

import litserve


class Noop(litserve.LitAPI):  # type: ignore[misc]
    """Answers with what it is asked."""

    def setup(self, device: Any) -> None:
        """There is nothing to load."""

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # LitServe reads a body only where none is
        """Return the numbers of a request."""
        return [float(value) for value in request["inputs"]]

    def predict(self, values: Any) -> Any:
        """Return them as they are."""
        return values

    def encode_response(self, values: Any) -> Any:
        """Return the body of the answer."""
        return {"predictions": [{"value": value} for value in values]}
