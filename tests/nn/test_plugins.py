"""A treatment and a kind of state, each added from outside the package in a few lines."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu

import lightning_revlib as revlib
from lightning_revlib.nn.state import KINDS, State
from lightning_revlib.nn.treatments import TREATMENTS
from lightning_revlib.nn.treatments.store import Store


def gradients(stack: nn.Module, x: Tensor) -> list[Tensor]:
    random.seed(5)
    return list(torch.autograd.grad(stack(x).square().sum(), [x, *stack.parameters()]))


def blocks(kind: Any = nn.Tanh) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(4, 4), kind()).double() for _ in range(4)]


class OnTheHost(Store):
    """Keep what the block saves in the host's memory, copied while nothing else runs."""

    def step(self, step: Any, a: Tensor, b: Tensor) -> Any:
        with save_on_cpu():
            return super().step(step, a, b)


def test_a_treatment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(TREATMENTS, "on the host", OnTheHost)
    treatments = ["on the host", "reversible", "on the host", "checkpoint"]
    stack = revlib.ReversibleSequential(*blocks(), treatments=treatments)
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = gradients(revlib.CoupledSequential(*stack), x)
    assert all(map(torch.equal, gradients(stack, x), expected))
    planned = revlib.ReversibleSequential(*stack, memory_budget=0.9)
    planned(x).sum().backward()
    assert set(planned.plan.treatments["stack"]) <= set(TREATMENTS)  # the planner has tried it, too
    with pytest.raises(ValueError, match="'on the host'"):
        revlib.ReversibleSequential(*stack, treatments=["on the moon"] * 4)


class PythonsRandom(State):
    """The state of Python's own generator before a call that draws from it."""

    def __init__(self, call: Any) -> None:
        self.before = random.getstate()

    def close(self) -> bool:
        return random.getstate() != self.before

    @contextmanager
    def restore(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        now = random.getstate()
        random.setstate(self.before)
        try:
            yield
        finally:
            random.setstate(now)


class Jitter(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin() * x.new_full((1,), random.uniform(0.5, 2))


@pytest.mark.parametrize("treatment", ["reversible", "checkpoint", "selective"])
def test_a_kind_of_state(treatment: str) -> None:
    stack = revlib.ReversibleSequential(*blocks(Jitter), treatments=[treatment] * 4, on_drift="ignore")
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    expected = gradients(revlib.CoupledSequential(*copy.deepcopy(stack)), x)
    assert not all(map(torch.allclose, gradients(stack, x), expected))
    KINDS.append(PythonsRandom)
    try:
        found = gradients(stack, x)
    finally:
        KINDS.remove(PythonsRandom)
    assert all(torch.allclose(x, y, rtol=1e-12) for x, y in zip(found, expected, strict=True))
