"""Training steps that compute shapes only, under FakeTensorMode and on the meta device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import lightning_revlib as revlib
from lightning_revlib.nn.treatments import TREATMENTS
from tests.nn.fake_device import Device


class Block(nn.Module):
    """Has state of all kinds: buffers, a generator, a tensor, a parameter that it moves; and draws random numbers."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Dropout(), nn.GELU())
        self.generator, self.style = torch.Generator(), torch.ones(64)
        self.scale = nn.Parameter(torch.ones(64), requires_grad=False)
        self.register_buffer("mean", torch.zeros(64))

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.9).add_(x.detach().mean(0))
        self.scale.data.mul_(0.9)
        return self.layers(x) * self.style * self.scale.clone() - self.mean


OPTIONS: dict[str, dict[str, Any]] = {
    **{name: {"treatments": [name] * 3} for name in TREATMENTS},
    "grid": {"grid_bits": 10},
    "budget": {"memory_budget": "1GiB"},
}


def train(around: Callable[[], AbstractContextManager[Any]], options: dict[str, Any]) -> list[Tensor]:
    """Return the input, its gradient, and parameters and theirs."""
    with around():
        stack = revlib.ReversibleSequential(*[Block() for _ in range(3)], **options)
        x = torch.randn(256, 128, requires_grad=True)
        for _ in range(2):
            stack(x).square().sum().backward()
    leaves = [x, *[p for p in stack.parameters() if p.requires_grad]]
    assert all(t.grad is not None and t.grad.shape == t.shape for t in leaves)
    return [t.grad for t in leaves if t.grad is not None]


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_under_a_fake_mode(option: str) -> None:
    before = torch.get_rng_state()
    assert all(
        type(grad) is not Tensor and grad.device.type == "cpu" for grad in train(FakeTensorMode, OPTIONS[option])
    )
    assert torch.equal(torch.get_rng_state(), before)


def test_offload_under_a_fake_mode(device: Device) -> None:
    train(FakeTensorMode, OPTIONS["offload"])


@pytest.mark.parametrize("option", OPTIONS)
def test_a_step_on_the_meta_device(option: str) -> None:
    assert all(grad.is_meta for grad in train(lambda: torch.device("meta"), OPTIONS[option]))


@pytest.mark.parametrize("where", ["meta", "fake"])
def test_a_memory_plan_is_made_without_memory(where: str) -> None:
    def plan(device: str) -> Any:
        with torch.device(device):
            blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.1)) for _ in range(8)]
            stack, x = revlib.ReversibleSequential(*blocks, memory_budget=0.8), torch.randn(64, 16)
        for _ in range(2):
            stack(x).sum().backward()
        return stack.plan

    expected = plan("cpu")
    with FakeTensorMode() if where == "fake" else contextlib.nullcontext():
        found = plan("meta" if where == "meta" else "cpu")
    assert (found.minimum, found.plain) == (expected.minimum, expected.plain)
