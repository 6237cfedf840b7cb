"""Random numbers that blocks draw, from generators of their own too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.state.twins import TREATMENTS, sample


class Draws(nn.Module):
    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.linear, self.generator = nn.Linear(4, 4, dtype=torch.float64), generator

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * torch.rand(x.shape, generator=self.generator, dtype=x.dtype)  # type: ignore[no-any-return]


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_blocks_that_draw_from_generators_of_their_own(treatment: Any) -> None:
    torch.manual_seed(0)
    x, found = sample(), []
    for kind in (revlib.ReversibleSequential, revlib.CoupledSequential):
        torch.manual_seed(0)
        shared, own = torch.Generator().manual_seed(1), torch.Generator().manual_seed(2)
        stack = kind(Draws(shared), Draws(own), Draws(shared), treatments=[treatment] * 3)
        found.append([])
        for _ in range(2):
            y = stack(x).square().sum()
            torch.rand(1, generator=shared)
            found[-1] += torch.autograd.grad(y, [x, *stack.parameters()])
        found[-1] += [shared.get_state(), own.get_state()]
    for grad, expected in zip(*found, strict=True):
        assert torch.allclose(grad, expected, rtol=1e-12)


def test_a_block_that_draws_nothing_restores_no_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    loss = stack(torch.randn(2, 8)).sum()

    def refuse(state: Tensor) -> None:
        raise AssertionError("the generator's state was set")

    monkeypatch.setattr(torch, "set_rng_state", refuse)
    loss.backward()
    assert stack[0].weight.grad is not None  # type: ignore[union-attr]
