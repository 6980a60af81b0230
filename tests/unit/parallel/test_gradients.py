"""The norm of gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from eagleray.parallel.gradients import gradient_norm


@pytest.mark.parametrize("shape", [(), (7,), (0, 3), (4000, 128), (16, 3, 2, 2)])
def test_the_norm_is_exact_also_of_a_large_gradient_of_few_large_values(shape: tuple[int, ...]) -> None:
    parameter = nn.Parameter(torch.zeros(shape))
    draw = torch.Generator().manual_seed(0)
    # Such is the gradient of an embedding: some rows are seen often, most of them hardly ever.
    parameter.grad = torch.randn(shape, generator=draw) * torch.rand(shape, generator=draw) ** 12
    exact = float(parameter.grad.double().norm())
    assert float(gradient_norm([parameter])) == pytest.approx(exact, rel=3e-7)
