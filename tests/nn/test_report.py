from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import lightning_revlib as revlib


def model() -> nn.Module:
    blocks = [nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Dropout(0.1), nn.Tanh()) for _ in range(12)]
    return nn.Sequential(nn.Linear(4, 16), revlib.CoupledSequential(*blocks), nn.Linear(16, 1))


def test_report_measures_and_leaves_the_model_as_it_was() -> None:
    net, x = model(), torch.randn(64, 4)
    state, generator, modes = (
        copy.deepcopy(net.state_dict()),
        torch.get_rng_state(),
        [m.training for m in net.modules()],
    )
    report = revlib.report(net, x)
    assert report.held_after < 0.2 * report.held_before and report.peak_after < 0.5 * report.peak_before
    assert report.flops_after == pytest.approx(4 / 3 * report.flops_before, rel=0.05)
    assert [row[:2] for row in report.stacks] == [("1", 12)]
    assert "1: 12 steps, Additive()" in str(report) and "KiB" in str(report)
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters()) and type(net[1]) is revlib.CoupledSequential  # type: ignore[index]
    assert torch.equal(generator, torch.get_rng_state()) and modes == [m.training for m in net.modules()]


def test_report_is_the_same_for_a_model_already_swapped() -> None:
    net, x = model(), torch.randn(64, 4)
    before = revlib.report(net, x)
    revlib.swap(net)
    assert revlib.report(net, x) == before
    assert type(net[1]) is revlib.ReversibleSequential  # type: ignore[index]


def test_report_takes_targets() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]))
    wide = nn.Sequential(nn.Linear(4, 4), nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(8)]))
    report = revlib.report(wide, torch.randn(64, 4), targets={"1": {"coupling": "additive", "split_dim": None}})
    assert report.held_after < report.held_before and type(wide[1]) is nn.Sequential
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # plain, its blocks see the whole width
        revlib.report(net, torch.randn(64, 4), targets={"1": {"coupling": "additive"}})
    assert type(net[1]) is nn.Sequential
