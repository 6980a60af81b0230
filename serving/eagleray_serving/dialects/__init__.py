"""What clients that people already have send, on top of the models' own routes.

Each dialect is thin: it reads its request, asks the same models in the same way as `/v1` does, and writes its
answer and its errors in its own shape.
"""

from collections.abc import Sequence

from starlette.routing import BaseRoute

from eagleray_serving.dialects import deepl, huggingface, inference_protocol, libretranslate
from eagleray_serving.dialects.models import Models

__all__ = ["Models", "dialect_routes"]


def dialect_routes(models: Models) -> Sequence[BaseRoute]:
    """Return the routes of all dialects."""
    dialects = (huggingface, deepl, libretranslate, inference_protocol)
    return [route for dialect in dialects for route in dialect.routes(models)]
