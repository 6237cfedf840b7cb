"""Derivatives of other kinds: batched gradients, and forward over reverse."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as fw
from torch import Tensor, nn

import lightning_revlib as revlib

DIRECTIONS = torch.eye(24, dtype=torch.float64).view(24, 3, 8)
TREATMENTS = ["reversible", "checkpoint", "selective"]


class Noisy(nn.Module):
    """Draws, writes into a tensor that it makes, and decides by a value: all of which a vmap forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.empty_like(x).normal_()
        y = self.layer(x) * noise.sin()
        return y.tanh() if noise.sum().item() > 0 else y.sin()


def blocks() -> list[nn.Module]:
    made = [nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Tanh()), nn.BatchNorm1d(4), Noisy()]
    return [block.double() for block in made]


@pytest.mark.parametrize("randomness", ["error", "same", "different"])
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_batched_gradients(treatment: str, randomness: str) -> None:
    plain = revlib.CoupledSequential(*blocks())
    stack = revlib.ReversibleSequential(*copy.deepcopy(list(plain)), treatments=[treatment] * 3)  # type: ignore[list-item]
    x, found = torch.randn(3, 8, dtype=torch.float64, requires_grad=True), []
    for each in (plain, stack):
        torch.manual_seed(1)
        gradients = partial(torch.autograd.grad, each(x), [x, *each.parameters()])
        found.append([*torch.func.vmap(gradients, randomness=randomness)(DIRECTIONS), torch.rand(1)])
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_is_grads_batched(treatment: str) -> None:
    stack = revlib.ReversibleSequential(*blocks()[:2], treatments=["store", treatment])  # type: ignore[list-item]
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    (batched,) = torch.autograd.grad(stack(x), x, DIRECTIONS, is_grads_batched=True, retain_graph=True)
    assert batched.shape == (24, 3, 8)
    stack[1] = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5)).double()
    with pytest.raises(RuntimeError, match=r"stack\.1 \(Sequential\) draws random numbers, .* use torch\.func\.vmap"):
        torch.autograd.grad(stack(x), x, DIRECTIONS, is_grads_batched=True)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_forward_over_reverse_is_refused(treatment: str) -> None:
    stack = revlib.ReversibleSequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3)]).double()
    x, direction = torch.randn(2, 3, 8, dtype=torch.float64)
    x.requires_grad_()
    with fw.dual_level():
        expected = fw.unpack_dual(revlib.CoupledSequential(*stack)(fw.make_dual(x, direction))).tangent
        y = stack(fw.make_dual(x, direction))
        torch.testing.assert_close(fw.unpack_dual(y).tangent, expected)
        with pytest.raises(RuntimeError, match=r"stack\.2 \(Sequential\): .* forward-mode AD .* treatment 'store'"):
            torch.autograd.grad(y.pow(3).sum(), x)
    stack.treatments = ("store",) * 3
    with fw.dual_level():
        (grad,) = torch.autograd.grad(stack(fw.make_dual(x, direction)).pow(3).sum(), x)
        assert fw.unpack_dual(grad).tangent.any()
