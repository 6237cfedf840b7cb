"""Gradients of any order, after errors, and of blocks that are compiled by TorchScript."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)


@pytest.mark.parametrize("split_dim", [1, None])
@pytest.mark.parametrize("coupling", [name for name, cls in revlib.COUPLINGS.items() if not cls.needs_grid])
def test_gradcheck_and_gradgradcheck(coupling: str, split_dim: int | None) -> None:
    width = revlib.get_coupling(coupling).branch_shape(torch.Size([2, 3]))[1]
    blocks = [nn.Sequential(nn.Linear(3, width), nn.Tanh()) for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, coupling=coupling, split_dim=split_dim).double()
    x = torch.randn(2, 6 if split_dim else 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(stack, (x,))
    assert torch.autograd.gradgradcheck(stack, (x,))


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint"])
def test_scripted_blocks(treatment: Any) -> None:
    layers = [nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 4)]
    blocks = [torch.jit.script(nn.Sequential(*copy.deepcopy(layers))) for _ in range(3)]
    stack, x = revlib.ReversibleSequential(*blocks, treatments=[treatment] * 3), torch.randn(8, 8, requires_grad=True)
    plain = revlib.CoupledSequential(*blocks)
    plain(x).sum().backward()  # they are compiled after it, and what they save changes with that
    for _ in range(3):
        grads = [torch.autograd.grad(each(x).square().sum(), [x, *stack.parameters()]) for each in (stack, plain)]
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*grads, strict=True))
    assert {int(count) for name, count in stack.named_buffers() if "num_batches" in name} == {1 + 3 * 2}


def test_a_scripted_block_that_has_not_been_compiled_is_an_error_that_says_so() -> None:
    stack = revlib.ReversibleSequential(torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))))
    with pytest.raises(RuntimeError, match="compiled after its first call with gradients"):
        stack(torch.randn(8, 10)).sum().backward()
    stack(torch.randn(8, 10)).sum().backward()


def test_backward_can_be_repeated_after_an_error() -> None:
    class Fails(nn.Module):
        fail = False

        def forward(self, x: Tensor) -> Tensor:
            if self.fail:
                raise MemoryError
            return x.tanh()

    stack, x = (
        revlib.ReversibleSequential(nn.Linear(4, 4), Fails(), nn.Linear(4, 4)).double(),
        torch.randn(2, 8).double(),
    )
    x.requires_grad_()
    loss = stack(x).square().sum()
    Fails.fail = True
    with pytest.raises(MemoryError):
        loss.backward(retain_graph=True)
    Fails.fail = False
    stack.zero_grad()
    x.grad = None
    loss.backward()
    (expected,) = torch.autograd.grad(revlib.CoupledSequential(*stack)(x).square().sum(), x)
    assert x.grad is not None
    assert torch.allclose(x.grad, expected, rtol=1e-12)


class FailsOnce(nn.Module):
    """Draws random numbers in training; its next call fails if that is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout, self.fails = nn.Linear(4, 4).double(), nn.Dropout(0.5), list[bool]()

    def forward(self, x: Tensor) -> Tensor:
        if self.fails:  # a list: attributes that are plain are put back
            self.fails.clear()
            raise MemoryError
        return self.dropout(self.layer(x).tanh())


@pytest.mark.parametrize("on_drift", ["ignore", "warn"])
def test_random_numbers_are_those_of_the_forward_after_an_error(on_drift: Any) -> None:
    stack = revlib.ReversibleSequential(*[FailsOnce() for _ in range(2)], on_drift=on_drift)
    x = torch.randn(8, 8, dtype=torch.float64)
    stack.eval()(x).sum().backward()  # draws none
    stack.train()
    losses = []
    for each in (revlib.CoupledSequential(*stack), stack):
        torch.manual_seed(1)
        losses.append(each(x).square().sum())
    expected = torch.autograd.grad(losses[0], list(stack.parameters()))
    stack[1].fails.append(True)  # type: ignore[union-attr, operator]
    with pytest.raises(MemoryError):
        losses[1].backward(retain_graph=True)
    stack.zero_grad()
    losses[1].backward()
    torch.testing.assert_close([p.grad for p in stack.parameters()], list(expected), rtol=1e-12, atol=1e-12)


def test_autocast_ends_before_backward() -> None:
    seen: list[torch.dtype] = []

    class Watch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            seen.append(y.dtype)
            return y

    with torch.autocast("cpu", torch.bfloat16):
        loss = revlib.ReversibleSequential(Watch(), Watch())(torch.randn(2, 8)).sum()
    loss.backward()
    assert seen == [torch.bfloat16] * 4


@pytest.mark.parametrize("treatments", [["reversible"] * 3 + ["store"], ["store", "reversible", "reversible", "store"]])
def test_an_optimizer_in_backward_steps_stored_blocks_first(treatments: list[str]) -> None:
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double() for _ in range(4)]
    x, results = torch.linspace(-1, 1, 16, dtype=torch.float64).view(2, 8), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        stack = cls(*copy.deepcopy(blocks), treatments=treatments)
        for p in stack.parameters():
            p.register_post_accumulate_grad_hook(step_at_once)
        for _ in range(2):
            stack(x).square().sum().backward()
        results.append(list(stack.parameters()))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def step_at_once(p: Tensor) -> None:
    assert p.grad is not None
    with torch.no_grad():
        p -= 0.1 * p.grad
    p.grad = None
