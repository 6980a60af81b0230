"""scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels, without a download."""

from __future__ import annotations

from io import BytesIO
from typing import Any

from eagleray.errors import UsageError

BRIGHTEST = 16
"""The largest value of a pixel in the original."""


def digit_examples() -> list[dict[str, Any]]:
    """Return the rows: `image` (PNG, 8-bit grey), `label` ("0" to "9"), `kind`, `key`.

    Raises:
        UsageError: scikit-learn or pillow is not installed.
    """
    try:
        from PIL import Image
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UsageError(
            f"data.source: digits needs {error.name}, which is not installed", "pip install 'eagleray[digits]'"
        ) from error
    digits = load_digits()
    rows = []
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        png = BytesIO()
        Image.fromarray((pixels * (255 / BRIGHTEST)).astype("uint8")).save(png, format="PNG")
        rows.append({"image": png.getvalue(), "label": str(label), "kind": "digit", "key": f"digit:{number}"})
    return rows
