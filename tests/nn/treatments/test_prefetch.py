"""Overlap, steps undone ahead on a stream of their own: right, without races, and each wait is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from lightning_revlib.strategies.base import make_budget, swap_module
from lightning_revlib.strategies.fsdp import shard
from tests.nn.conditions import CONDITIONS
from tests.nn.fake_device import Device, compare_on, leave_out
from tests.nn.test_matrix import COUPLINGS


class Overlapping(revlib.ReversibleSequential):
    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        super().__init__(*blocks, **{"overlap": "memory_budget" not in options, **options})


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("coupling", ["additive", "mixed", "bdia, exact"])
def test_is_right_and_without_races(coupling: str, name: str, device: Device) -> None:
    compare_on(device, Overlapping, COUPLINGS[coupling], name)


def train() -> None:
    Overlapping(*[nn.Linear(4, 4) for _ in range(5)])(torch.randn(3, 8)).sum().backward()


def ask_for_one_step_only() -> None:
    stack = Overlapping(*[nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4)) for _ in range(4)])
    torch.autograd.grad(stack(torch.randn(3, 8)).sum(), list(stack[2].parameters()))
    torch.ones(3) + 1  # may get the memory that the side stream reads and writes


def go_backward_twice() -> None:
    loss = Overlapping(*[nn.Linear(4, 4) for _ in range(4)])(torch.randn(3, 8)).sum()
    loss.backward(retain_graph=True)
    loss.backward()


RUNS = [train, ask_for_one_step_only, go_backward_twice]


def test_each_wait_is_needed() -> None:
    """Each place where the library waits for a stream is a race in some run if it does not."""
    found = [leave_out(run) for run in RUNS]
    places = {place for each in found for place in each}
    assert places
    for place in places:
        assert any(any(each.get(place, ())) for each in found), f"{place} can be left out"


def test_a_step_that_nobody_asks_for(device: Device) -> None:
    with device:
        ask_for_one_step_only()
    assert device.work["side"] and not device.races, device.races[:3]


def test_holds_what_two_blocks_save(device: Device) -> None:
    peaks = []
    for overlapping in (False, True):
        stack = revlib.ReversibleSequential(
            *[nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(8)], overlap=overlapping
        )
        x = torch.randn(512, 128)
        with device, revlib.MemoryMeter() as meter:
            for p in stack.parameters():
                p.register_post_accumulate_grad_hook(meter.forget_gradient)
            y = stack(x)
            meter.reset_peak()
            y.sum().backward()
        peaks.append(meter.peak / y.nbytes)
    assert peaks[0] < peaks[1] < peaks[0] + 6


def test_does_nothing_where_there_are_no_streams() -> None:
    stack = revlib.ReversibleSequential(*[nn.Linear(4, 4) for _ in range(4)], overlap=True)
    stack(torch.randn(3, 8)).sum().backward()
    assert stack.drift is not None


def test_errors_of_overlap() -> None:
    with pytest.raises(TypeError, match="overlap='yes': pass True or False"):
        revlib.ReversibleSequential(nn.Linear(4, 4), overlap="yes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"overlap=True holds what two blocks save, memory_budget=0\.5"):
        revlib.ReversibleSequential(nn.Linear(4, 4), overlap=True, memory_budget=0.5)
    overlapping = nn.Sequential(revlib.ReversibleSequential(nn.Linear(4, 4), overlap=True))
    with pytest.raises(ValueError, match="0: overlap=True holds what two blocks save, memory_budget='1MiB'"):
        swap_module(overlapping, None, make_budget("1MiB"))
    with pytest.raises(ValueError, match="0: overlap=True runs a block on a stream of its own, FSDP"):
        shard(overlapping, mesh=None)  # type: ignore[arg-type]
