"""Parametrized weights, cached over two forwards, or over forward or backward only."""

from __future__ import annotations

import gc
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, sample, twins

WHERE = {"around both": (True, True), "forward": (True, False), "backward": (False, True)}


def block() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(4, 4).double()), nn.Tanh())


def gradients(stack: nn.Module, x: Tensor, forward: bool, backward: bool) -> list[Tensor]:
    if forward and backward:
        with parametrize.cached():
            return gradients(stack, x, False, False)
    with parametrize.cached() if forward else nullcontext():
        loss = (stack(x) - stack(2 * x)).square().sum()
    with parametrize.cached() if backward else nullcontext():
        grads = torch.autograd.grad(loss, [x, *stack.parameters()], create_graph=True)
        return [*grads, *torch.autograd.grad(sum(g.square().sum() for g in grads), [x, *stack.parameters()])]


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("treatment", TREATMENTS)
def test_cached_parametrizations(treatment: Any, where: str) -> None:
    stack, plain = twins(block, treatment)
    x = sample()
    assert all(map(torch.allclose, gradients(stack, x, *WHERE[where]), gradients(plain, x, *WHERE[where])))


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_a_cached_weight_of_a_shared_block_is_freed(treatment: Any) -> None:
    each = block()
    stack, x, live = revlib.ReversibleSequential(*[each] * 3, treatments=[treatment] * 3), sample(), []
    gc.disable()
    try:
        with revlib.MemoryMeter() as meter:
            for _ in range(3):
                with parametrize.cached():
                    stack(x)
                live.append(meter.live)
    finally:
        gc.enable()
    assert live[0] == live[1] == live[2]
