"""Matrix products of a loaded model, their weights laid out once for the precision that serves them."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Precision = Literal["float32", "bfloat16", "float16", "int8"]

Linear = Callable[[Tensor], Tensor]
"""From (..., inputs) to (..., outputs)."""


def activation_dtype(precision: Precision) -> torch.dtype:
    """Return the type of what flows between matrix products."""
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(precision, torch.float32)


def make_linear(weight_OI: Tensor, bias_O: Tensor | None, precision: Precision = "float32") -> Linear:
    """Return the product with a matrix.

    Args:
        weight_OI: The matrix, outputs by inputs, as `nn.Linear` has it.
        bias_O: What is added.
        precision: Of the product; `int8` takes and gives float32.
    """
    if precision == "int8":
        return _make_int8(weight_OI.float(), None if bias_O is None else bias_O.float())
    dtype = activation_dtype(precision)
    weight_OI = weight_OI.to(dtype)
    bias_O = None if bias_O is None else bias_O.to(dtype)

    def linear(x: Tensor) -> Tensor:
        return F.linear(x, weight_OI, bias_O)

    return linear


def _make_int8(weight_OI: Tensor, bias_O: Tensor | None) -> Linear:
    """Return a product of 8-bit integers: weights scaled by output, activations anew at every call (CPU only)."""
    scales_O = (weight_OI.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny)
    places = torch.zeros(len(scales_O), dtype=torch.int64)
    with warnings.catch_warnings():
        # torch announces the end of its quantised tensors; the product itself takes nothing else.
        warnings.simplefilter("ignore", UserWarning)
        quantised = torch.quantize_per_channel(weight_OI, scales_O.double(), places, 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(quantised, bias_O)
    product = torch.ops.quantized.linear_dynamic

    def linear(x: Tensor) -> Tensor:
        # Activations of 7 bits: without them, processors older than AVX512-VNNI overflow.
        found: Tensor = product(x, packed, True)
        return found

    return linear
