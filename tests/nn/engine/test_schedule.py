"""Steps that save next to nothing are undone in one go, before autograd asks for each of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


def blocks(depth: int = 6, width: int = 4) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth)]


@pytest.mark.parametrize("on_drift", ["warn_once", "raise"])
def test_a_step_that_cannot_be_undone_fails_only_if_it_is_asked_for(on_drift: Any) -> None:
    stack = revlib.ReversibleSequential(*blocks(), on_drift=on_drift)
    last = list(stack[-1].parameters())
    y = stack(torch.randn(3, 8))
    expected = torch.autograd.grad(y.sum(), last, retain_graph=True)
    with torch.no_grad():
        stack[2][0].weight += 1
    found = torch.autograd.grad(y.sum(), last, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"parameter 'weight' of Linear\(.*has been modified in place"):
        y.sum().backward()


class Twice(torch.autograd.Function):
    """Multiplies two tensors; its backward asks twice for what it has saved."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor) -> Tensor:
        ctx.save_for_backward(x, y)
        return x * y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        _, y = ctx.saved_tensors
        x, _ = ctx.saved_tensors
        return grad * y, grad * x


class Product(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(4, dtype=torch.double))

    def forward(self, x: Tensor) -> Tensor:
        return Twice.apply(x.tanh(), self.scale).sin()


@pytest.mark.parametrize("retain", [False, True])
def test_tensors_that_are_asked_for_twice(retain: bool) -> None:
    found = []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        torch.manual_seed(0)
        stack, x = cls(*[Product() for _ in range(5)]), torch.randn(3, 8, dtype=torch.double, requires_grad=True)
        loss = stack(x).square().sum()
        for _ in range(1 + retain):
            loss.backward(retain_graph=retain)
        found.append([x.grad, *[p.grad for p in stack.parameters()]])
    torch.testing.assert_close(found[0], found[1])


def test_it_holds_64_kib_more_at_most() -> None:
    def peak(rows: int, treatments: list[str] | None = None) -> int:
        stack = revlib.ReversibleSequential(*blocks(40, 16), treatments=treatments)
        loss = stack(torch.randn(rows, 32)).sum()
        for p in stack.parameters():
            p.grad = torch.zeros_like(p)
        with revlib.MemoryMeter() as meter:
            loss.backward()
        return meter.peak

    alone, together = peak(2000), peak(20)  # 128 KB a tensor, 1,280 bytes
    assert together - alone / 100 < 70 * 1024 and together > 3 * alone / 100
