"""The default dtype and device of the forward, under which a block runs again."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def test_default_dtype_is_that_of_the_forward() -> None:
    class MakesTensors(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * torch.full((), 0.5).exp() * x.tanh()

    stack = revlib.ReversibleSequential(MakesTensors(), MakesTensors())
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    torch.set_default_dtype(torch.float64)
    try:
        y = stack(x)
    finally:
        torch.set_default_dtype(torch.float32)
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.set_default_dtype(torch.float64)
    try:
        (expected,) = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).sum(), x)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.allclose(grad, expected, rtol=1e-12)


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_tensors_made_in_a_block_are_on_the_device_that_was_the_default_in_forward(treatment: Any) -> None:
    devices = []

    class Makes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            devices.append(torch.empty(1).device.type)
            return x.sin()

    stack = revlib.ReversibleSequential(*[Makes() for _ in range(3)], treatments=[treatment] * 3)
    with torch.device("meta"):
        y = stack(torch.randn(4, 8, device="cpu", requires_grad=True))
    y.sum().backward()
    assert devices == ["meta"] * 6
    devices.clear()
    y = stack(torch.randn(4, 8, requires_grad=True)).sum()
    with torch.device("meta"):
        y.backward(torch.ones((), device="cpu"))
    assert devices == ["cpu"] * 6
