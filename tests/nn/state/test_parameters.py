"""Parameters that are others, or changed, between forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.nn.state.twins import TREATMENTS, sample, twins


class OnASphere(nn.Parameter):
    """A parameter of a type of its own, as those of libraries for manifolds."""


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = OnASphere(torch.randn(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).tanh()


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_parameters_of_ones_own_type_that_are_lent_for_a_forward(treatment: Any) -> None:
    x, grads = sample(), []
    for module in twins(Scales, treatment):
        lent = {name: p.detach() * 2 for name, p in module.named_parameters()}
        grads.append(torch.autograd.grad(functional_call(module, lent, x).square().sum(), x)[0])
    assert torch.allclose(*grads, rtol=1e-9)


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_change_after_a_differentiable_backward_is_an_error(treatment: Any) -> None:
    stack, _ = twins(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh()).double(), treatment)
    x = sample()
    y = stack(x)
    torch.autograd.grad(y.sum(), x, create_graph=True)
    with torch.no_grad():
        next(stack.parameters()).add_(1)
    with pytest.raises(RuntimeError, match=r"stack.0 .* modified in place since a first backward with create_graph"):
        torch.autograd.grad(y.square().sum(), x)
