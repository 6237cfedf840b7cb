"""A mixture of experts trains on the grid that `report` recommends for it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class MoE(nn.Module):
    """A feed-forward layer that sends each row to the best of its experts."""

    def __init__(self, width: int, experts: int = 8) -> None:
        super().__init__()
        self.norm, self.router = nn.LayerNorm(width), nn.Linear(width, experts)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        p, best = self.router(x).softmax(-1).max(-1)
        out = torch.zeros_like(x)
        for k, expert in enumerate(self.experts):
            rows = (best == k).nonzero().squeeze(1)
            out = out.index_add(0, rows, expert(x[rows]).tanh() * p[rows, None])
        return out


def train(net: Any, rows: int, steps: int) -> list[float]:
    """Return the losses. Each input that backward rebuilds is rebuilt exactly."""
    torch.manual_seed(1)
    optimizer, losses = torch.optim.Adam(net.parameters(), 1e-3), []
    for _ in range(steps):
        x = torch.randn(rows, 32)
        loss = (net(x) - x.roll(1, 1)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        assert not net.drift
    return losses


@pytest.mark.parametrize(
    ("rows", "depth", "steps"), [(256, 4, 10), pytest.param(16384, 12, 100, marks=pytest.mark.slow)]
)
def test_losses_are_those_of_stored_activations(rows: int, depth: int, steps: int) -> None:
    """Off the grid, the larger run ends at its seventh step, by a near tie that another rounding decides."""
    torch.manual_seed(0)
    net = revlib.ReversibleSequential(*[MoE(16) for _ in range(depth)])
    report = revlib.report(net, torch.randn(rows, 32))
    assert report.targets == {"": {"grid_bits": "auto"}} and "as in a router" in str(report)
    assert report.stacks[0].drift == 0
    revlib.swap(net, report.targets)
    stored = copy.deepcopy(net)
    revlib.swap(stored, {"": {"treatments": ["store"] * depth}})
    losses = train(net, rows, steps)
    assert losses == train(stored, rows, steps)
    assert net.drift == 0 and len(losses) == steps


def test_stacks_that_need_no_grid_keep_their_options() -> None:
    x = torch.randn(64, 32)
    for options in ({"grid_bits": 12}, {"coupling": "affine"}):
        blocks = [MoE(16) if options.keys() == {"grid_bits"} else Doubled(MoE(16)) for _ in range(2)]
        assert revlib.report(revlib.ReversibleSequential(*blocks, **options), x).targets is None
    plain = revlib.ReversibleSequential(*[nn.Linear(16, 16) for _ in range(2)])
    report = revlib.report(nn.Sequential(plain, revlib.ReversibleSequential(MoE(16), MoE(16))), x)
    assert report.targets == {"0": {}, "1": {"grid_bits": "auto"}} and len(report.stacks) == 2


class Doubled(nn.Module):
    """Returns scale and shift for an affine coupling."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.inner(x)] * 2, 1)
