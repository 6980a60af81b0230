"""Images that are hardly any, through the real task and engine: each is refused for itself, none is a 500."""

from __future__ import annotations

import asyncio
import base64
import io
import json

import httpx
import pytest
from fake_checkpoint import tiny_checkpoint
from PIL import Image
from starlette.types import ASGIApp

from eagleray.config.schema import ServeConfig
from eagleray.engine import Engine, load_engine
from eagleray.tasks.image_classification import PIXELS_AT_ONCE, _opened
from eagleray_serving.batched import BatchedEngine
from eagleray_serving.catalog import ModelCard
from eagleray_serving.service import ModelService


def written(image: Image.Image, format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, format)
    return stream.getvalue()


NOISE = Image.effect_noise((64, 64), 50)
WHOLE = written(NOISE)
# Bytes, and the code of the failure in the image's place; None: it is answered.
IMAGES: dict[str, tuple[bytes, str | None]] = {
    "whole": (WHOLE, None),
    "one pixel": (written(Image.new("L", (1, 1))), None),
    "a line": (written(Image.new("L", (1, 3000))), None),
    "colours": (written(Image.new("RGBA", (9, 9), (1, 2, 3, 4))), None),
    "a palette": (written(Image.new("P", (9, 9))), None),
    "sixteen bits": (written(Image.new("I;16", (9, 9))), None),
    "one bit": (written(Image.new("1", (9, 9))), None),
    "four inks": (written(Image.new("CMYK", (9, 9)), "JPEG"), None),
    "large and nearly empty": (written(Image.new("1", (4000, 4000))), None),
    "cut in the middle": (WHOLE[: len(WHOLE) // 2], "invalid_item"),
    "a byte of its pixels is another": (WHOLE[:200] + b"\xff\x00\xff" + WHOLE[203:], "invalid_item"),
    "a cut JPEG": (written(NOISE, "JPEG")[:700], "invalid_item"),
}


@pytest.fixture(scope="module")
def engine() -> Engine:
    return load_engine(tiny_checkpoint("image-classification")[0])


@pytest.fixture
def app(engine: Engine) -> ASGIApp:
    serve = ServeConfig(max_image_pixels=16_000_000)
    card = ModelCard("digits", "r1-step-00000010", "classify", "images")
    return ModelService(card, engine.summary.input_columns, BatchedEngine(engine, serve), serve).application()


def ask(app: ASGIApp, *images: bytes) -> tuple[int, list[str | None]]:
    body = json.dumps({"images": [base64.b64encode(image).decode() for image in images]}).encode()

    async def go() -> httpx.Response:
        transport = httpx.ASGITransport(app=app)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.post("/v1/classify", content=body, headers={"content-type": "application/json"})

    response = asyncio.run(go())
    if response.status_code != 200:
        return response.status_code, [response.json()["error"]["code"]]
    return 200, [each.get("error", {}).get("code") for each in response.json()["predictions"]]


@pytest.mark.parametrize("data, code", IMAGES.values(), ids=IMAGES)
def test_an_image_is_answered_or_refused_for_itself(app: ASGIApp, data: bytes, code: str | None) -> None:
    assert ask(app, WHOLE, data, WHOLE) == (200, [None, code, None])


def test_images_that_are_small_to_send_and_large_to_decode_are_refused_together(app: ASGIApp) -> None:
    large = IMAGES["large and nearly empty"][0]
    assert len(large) < 20_000
    assert ask(app, *[large] * 17) == (413, ["images_too_large"])


def test_a_batch_of_large_images_is_decoded_a_few_at_a_time() -> None:
    side = int((PIXELS_AT_ONCE / 2) ** 0.5) + 1
    sizes = [10, 10, side, side, 10, 2 * side, 10]
    rows = [{"image": written(Image.new("L", (size, size)))} for size in sizes]
    groups = [[image.width for image in images] for images in _opened(rows, "L")]
    assert groups == [[10, 10, side, side], [10, 2 * side], [10]]
