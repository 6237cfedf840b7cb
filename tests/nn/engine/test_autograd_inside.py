"""Blocks that call autograd in their forward, always or from some call on."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class Penalised(nn.Module):
    """Calls autograd in its forward from some call on; with noise, a buffer, or a buffer that counts its calls."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.what, self.penalty = nn.Linear(4, 4).double(), what, False
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64) if what in ("buffer", "count") else None)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(nn.functional.dropout(x) if self.what == "noise" else x).square()
        if self.what == "count":
            self.calls += 1
        if not self.penalty:
            return y
        return torch.autograd.grad(y.tanh().sum(), y, create_graph=True)[0] * y


@pytest.mark.parametrize("what", ["", "noise", "buffer", "count"])
def test_a_block_that_begins_to_call_autograd(what: str) -> None:
    blocks = [Penalised(what) for _ in range(3)]
    twins = copy.deepcopy(blocks)
    x = torch.randn(3, 8, dtype=torch.float64)
    found: list[list[Tensor | None]] = []
    for stack in (revlib.CoupledSequential(*twins), revlib.ReversibleSequential(*blocks)):
        for penalty in (False, False, True, False, True):
            for block in stack:
                block.penalty = penalty  # type: ignore[assignment]
            stack.zero_grad()
            torch.manual_seed(1)
            stack(x).sum().backward()
            found.append([p.grad for p in stack.parameters()])
    for theirs, ours in zip(found[:5], found[5:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_block_of_an_inner_stack_that_begins_to_call_autograd_on_the_outer_block() -> None:
    class Inner(nn.Module):
        outer: tuple[Tensor, Tensor] | None = None

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.BatchNorm1d(2).double()  # has buffers, so that it cannot be run again

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return y if self.outer is None else y * torch.autograd.grad(*self.outer, create_graph=True)[0].mean()

    class Outer(nn.Module):
        penalty = False

        def __init__(self, cls: type) -> None:
            super().__init__()
            self.inner, self.layer = Inner(), nn.Linear(4, 4).double()
            self.stack = cls(self.inner)

        def forward(self, x: Tensor) -> Tensor:
            h = self.layer(x).square()
            self.inner.outer = (h.exp().sum(), h) if self.penalty else None
            return self.stack(h)

    x, found = torch.randn(3, 8, dtype=torch.float64), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        torch.manual_seed(0)
        block = Outer(cls)
        stack = cls(block)
        for penalty in (False, True):
            block.penalty = penalty
            block.zero_grad()
            stack(x).sum().backward()
        found.append([p.grad for p in block.parameters()])
    for theirs, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


class Energy(nn.Module):
    """The gradient of an energy, which it takes in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(4, 4).double(), nn.BatchNorm1d(4).double()

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x if x.requires_grad else x.detach().requires_grad_()
            return torch.autograd.grad(self.norm(self.layer(x)).tanh().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("treatments", [["reversible", "checkpoint"], ["reversible", "store", "reversible"]])
def test_a_first_call_in_which_a_later_part_calls_autograd(treatments: Any) -> None:
    torch.manual_seed(0)
    blocks = [*[nn.Linear(4, 4).double() for _ in treatments[1:]], Energy()]
    stack = revlib.ReversibleSequential(*copy.deepcopy(blocks), treatments=treatments)
    plain = revlib.CoupledSequential(*blocks)
    x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(plain(x).square().sum(), x)
    assert torch.allclose(torch.autograd.grad(stack(x).square().sum(), x)[0], expected)


class Hamiltonian(nn.Module):
    """Its branch is the derivative of an energy, by torch.func."""

    def __init__(self, transform: Any) -> None:
        super().__init__()
        self.layer, self.transform = nn.Linear(4, 4).double(), transform

    def energy(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh().square().sum()

    def forward(self, x: Tensor) -> Tensor:
        return self.transform(self.energy, x)  # type: ignore[no-any-return]


TRANSFORMS = {
    "grad": lambda f, x: torch.func.grad(f)(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](torch.ones((), dtype=x.dtype))[0],
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "hessian": lambda f, x: torch.func.hessian(f)(x).sum((0, 1)),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "vmap": lambda f, x: torch.func.vmap(lambda row: f(row) * row)(x),
}


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective", "store"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_blocks_that_call_a_transform(name: str, treatment: Any) -> None:
    blocks = [nn.Linear(4, 4).double(), Hamiltonian(TRANSFORMS[name])]
    stack = revlib.ReversibleSequential(*blocks, treatments=["reversible", treatment])
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    if treatment != "store" and name not in ("jacfwd", "vmap"):
        with pytest.raises(
            RuntimeError, match=r"stack\.1 \(Hamiltonian\) calls torch\.func\.grad, .* treatment 'store'"
        ):
            stack(x)
        return
    expected = torch.autograd.grad(revlib.CoupledSequential(*blocks)(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(stack(x).square().sum(), x), expected, rtol=1e-12, atol=1e-12)
