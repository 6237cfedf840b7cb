"""Gradients and buffers under a plan are those of ordinary autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.plan.workloads import STACKS


def planned(stack: revlib.ReversibleSequential, x: Tensor) -> Any:
    state, buffers = torch.get_rng_state(), [b.clone() for b in stack.buffers()]
    stack(x)
    torch.set_rng_state(state)
    for b, start in zip(stack.buffers(), buffers, strict=True):
        b.copy_(start)
    assert stack.plan is not None
    return stack.plan


def gradients(stack: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    return list(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))


@pytest.mark.parametrize("kind", STACKS)
@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.8])
def test_gradients_and_buffers_are_those_of_autograd(kind: str, fraction: float) -> None:
    make, shape, options = STACKS[kind]
    torch.manual_seed(0)
    blocks, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    plan = planned(revlib.ReversibleSequential(*blocks, memory_budget=1.0, **options).double(), x)
    budget = int(plan.minimum + fraction * (plan.plain - plan.minimum))
    plain = revlib.CoupledSequential(*blocks, **options).double()
    buffers = [b.clone() for b in plain.buffers()]
    expected = [gradients(plain, x) for _ in range(2)]
    after = [b.clone() for b in plain.buffers()]
    for b, start in zip(plain.buffers(), buffers, strict=True):
        b.copy_(start)
    stack = revlib.ReversibleSequential(*blocks, memory_budget=budget, **options)
    for step in expected:  # the first measures, the second follows the plan
        for ours, theirs in zip(gradients(stack, x), step, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    for ours, theirs in zip(stack.buffers(), after, strict=True):
        torch.testing.assert_close(ours, theirs)
