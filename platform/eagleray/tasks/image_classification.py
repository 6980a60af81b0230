"""Image classification: one label of a fixed set for an image."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from eagleray.config.families import ViTFamily, parse_family
from eagleray.errors import ConfigError, DataError, StoreError, StoreURIError
from eagleray.hub import locate_pretrained
from eagleray.labels import labels_file, read_labels
from eagleray.store.objects import ObjectStore
from eagleray.tasks import rows
from eagleray.tasks.base import Batch, Encoded, Example, Features, Head, Processor
from eagleray.tasks.classification import ClassificationTask, pretrained_labels
from eagleray.tasks.tokenizer import as_directory, save_to_files

MAX_PIXELS = 50_000_000
# Decoded at the same time, if it is more than one image.
PIXELS_AT_ONCE = 4 * 2**20
"""Largest image that is opened: a small file may unpack to gigabytes."""

# Not among them: EPS, which Pillow hands to Ghostscript, a program.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
_PROCESSOR_FILE = "preprocessor_config.json"


class ImageClassificationProcessor(Processor):
    """Hugging Face's image processor, the number of channels and the class names."""

    def __init__(self, processor: Any, labels: Sequence[str]) -> None:
        self.processor = processor
        self.labels = tuple(labels)
        # One mean per channel: that is how an image processor says what its model sees.
        self.mode = "L" if len(processor.image_mean or (0, 0, 0)) == 1 else "RGB"

    def pixels(self, images: Sequence[Any]) -> Sequence[Any]:
        """Resize and normalise opened images, each for itself."""
        return self.processor(list(images), return_tensors="np")["pixel_values"]  # type: ignore[no-any-return]

    def files(self) -> dict[str, bytes]:
        """Return the image processor's file and ours."""
        return {**save_to_files(self.processor.save_pretrained), **labels_file(self.labels)}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> ImageClassificationProcessor:
        """Rebuild the processor from the files of a checkpoint."""
        return cls(_load_image_processor(files), read_labels(files))


class ImageClassificationTask(ClassificationTask):
    """Give `image` its `label`."""

    columns: ClassVar[tuple[str, ...]] = ("image", "label")
    input_columns: ClassVar[tuple[str, ...]] = ("image",)
    head: ClassVar[Head | None] = "image-classification"

    def build_processor(self, examples: Iterable[Example]) -> ImageClassificationProcessor:
        """Collect the labels, and take the pretrained model's image processor or describe the family's."""
        config = self.config
        if config.model.pretrained is not None:
            directory = locate_pretrained(config.model)
            labels = pretrained_labels(directory, config.data.labels, examples)
            files = {_PROCESSOR_FILE: _read_processor_file(directory)}
            return ImageClassificationProcessor(_load_image_processor(files), labels)
        processor = _load_image_processor({_PROCESSOR_FILE: self._describe_processor()})
        return ImageClassificationProcessor(processor, rows.collect_labels(config.data.labels, examples))

    def load_processor(self, files: Mapping[str, bytes]) -> ImageClassificationProcessor:
        """Rebuild the processor from the files of a checkpoint."""
        return ImageClassificationProcessor.from_files(files)

    def encode(self, example: Example, processor: Processor, *, answer: bool = False) -> Encoded:
        """Keep the image as the bytes of its file; it is opened once to see that it can be.

        Raises:
            DataError: It is no image, or the label is unknown.
        """
        features: Features = {"image": read_image_bytes(rows.read_column(example, "image"))}
        if not answer:
            features["label"] = rows.label_number(example, processor.labels)
        return Encoded(features, length=1)

    def collate(self, rows_: Sequence[Features], processor: Processor) -> Batch:
        """Resize and normalise, shapes (B, channels, height, width) and (B,)."""
        assert isinstance(processor, ImageClassificationProcessor)
        pixels = [each for images in _opened(rows_, processor.mode) for each in processor.pixels(images)]
        return {"pixel_values": torch.from_numpy(np.stack(pixels))} | self.collate_labels(rows_)

    def logits(self, model: nn.Module, batch: Batch) -> Any:
        """Return the scores of the classes, shape (B, classes)."""
        return model(pixel_values=batch["pixel_values"]).logits

    def _describe_processor(self) -> bytes:
        """Write what ViT's image processor has to do for `model.config`, in Hugging Face's words."""
        family = ViTFamily()
        if self.config.model.family is not None:
            parsed = parse_family(self.config.model)
            assert isinstance(parsed, ViTFamily), "the loader checks that the family fits the task"
            family = parsed
        middle = [0.5] * family.num_channels
        description = {
            "image_processor_type": "ViTImageProcessor",
            "do_resize": True,
            "size": {"height": family.image_size, "width": family.image_size},
            "resample": 2,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": middle,
            "image_std": middle,
        }
        return json.dumps(description, indent=2).encode()


def read_image_bytes(value: Any) -> bytes:
    """Return an image as the bytes of a PNG, JPEG or other file that Pillow opens.

    Args:
        value: The bytes, a path or store URI, an array of shape (height, width) or (height, width, 3) with values
            0 to 255, or Hugging Face's `{"bytes": ..., "path": ...}`.

    Raises:
        DataError: It is none of these, cannot be opened or is larger than `MAX_PIXELS`.
    """
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)):
        value = _read_file(str(value))
    if isinstance(value, (list, np.ndarray)):
        return _encode_array(value)
    if not isinstance(value, (bytes, bytearray, memoryview)):
        raise DataError(f"column 'image' holds a value of type {type(value).__name__}: no bytes, path or array")
    _open(bytes(value))
    return bytes(value)


def _read_file(path: str) -> bytes:
    try:
        if "://" not in path:
            return Path(path).read_bytes()
        location, _, name = path.rpartition("/")
        return _open_store(location).get(name)
    except OSError as error:
        raise DataError(f"column 'image': cannot read {rows.shorten(path)}: {error.strerror}") from None
    except (StoreError, StoreURIError) as error:
        raise DataError(f"column 'image': cannot read {rows.shorten(path)}: {error.message}") from None


@lru_cache(maxsize=16)
def _open_store(location: str) -> ObjectStore:
    """Open a folder of images once: a client of its own for each of a million of them would take hours."""
    return ObjectStore.open(location)


def _opened(rows_: Sequence[Features], mode: str) -> Iterator[list[Any]]:
    """Yield opened images, a few million pixels at a time: a batch of large ones may fill the memory."""
    images: list[Any] = []
    num_pixels = 0
    for row in rows_:
        images.append(_open(row["image"]).convert(mode))
        num_pixels += images[-1].width * images[-1].height
        if num_pixels >= PIXELS_AT_ONCE:
            yield images
            images, num_pixels = [], 0
    if images:
        yield images


def _encode_array(value: Any) -> bytes:
    """Write an array as PNG, which loses nothing."""
    from PIL import Image

    try:
        array = np.asarray(value)
        if not (0 <= array.min() and array.max() <= 255):
            raise ValueError(f"values from {array.min()} to {array.max()}, 0 to 255 were expected")
        image = Image.fromarray(array.astype(np.uint8))
    except (TypeError, ValueError) as error:
        raise DataError(f"column 'image' holds an array that is no image: {error}") from None
    buffer = BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def _open(data: bytes) -> Any:
    try:
        from PIL import Image
    except ImportError:
        raise ConfigError("images need Pillow", "pip install 'eagleray[images]'") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our limit is lower
            image = Image.open(BytesIO(data), formats=_FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(f"column 'image': {width} x {height} pixels are more than {MAX_PIXELS:,}")
        image.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"column 'image' is no image that can be opened: {error}") from None
    return image


def _load_image_processor(files: Mapping[str, bytes]) -> Any:
    from transformers import AutoImageProcessor

    with as_directory({_PROCESSOR_FILE: files[_PROCESSOR_FILE]}) as directory:
        return AutoImageProcessor.from_pretrained(directory, local_files_only=True, trust_remote_code=False)


def _read_processor_file(directory: Path) -> bytes:
    path = directory / _PROCESSOR_FILE
    if not path.is_file():
        raise ConfigError(f"{directory}: there is no {_PROCESSOR_FILE}, so nobody knows what its images look like")
    return path.read_bytes()
