"""Errors of the engine that name the cause and the way out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class Routed(nn.Module):
    """Computes some rows, chosen by the last bit of a number, as a router chooses experts in a near tie."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = (x[:, 0].detach().clone().view(torch.int32) & 1).nonzero().squeeze(1)
        return torch.zeros_like(x).index_add(0, rows, self.layer(x[rows]).tanh())


def test_a_near_tie_in_a_router() -> None:
    x, blocks = torch.randn(1000, 8), [Routed() for _ in range(3)]
    message = r"stack\.1 \(Routed\) computes(.|\n)*near tie, as in a router, .*option grid_bits='auto', .* 'checkpoint'"
    with pytest.raises(RuntimeError, match=message):
        revlib.ReversibleSequential(*blocks)(x).sum().backward()
    revlib.ReversibleSequential(*blocks, grid_bits=12)(x).sum().backward()
    revlib.ReversibleSequential(*blocks, treatments=["reversible", "checkpoint", "checkpoint"])(x).sum().backward()


class Probed(nn.Module):
    """Returns its branch, and a loss on features that it detaches."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.probe = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x).tanh(), self.probe(x.detach()).square().mean()


def losses(stack: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    y, extras = stack(x)
    return y.square().sum(), torch.stack([loss for (loss,) in extras]).sum()


def test_a_loss_on_detached_features_after_the_main_one() -> None:
    stack, x = revlib.ReversibleSequential(Probed(), Probed()), torch.randn(3000, 8)  # as small ones are undone at once
    main, probes = losses(stack, x)
    main.backward()
    with pytest.raises(RuntimeError, match=r"pass retain_graph=True to the first backward, or differentiate the sum"):
        probes.backward()
    found = []
    for cls, together in ((revlib.CoupledSequential, False), (revlib.ReversibleSequential, False), (type(stack), True)):
        stack.zero_grad()
        main, probes = losses(cls(*stack), x)
        if together:
            (main + probes).backward()
        else:
            main.backward(retain_graph=True)
            probes.backward()
        found.append([p.grad for p in stack.parameters()])
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0], found[2])
