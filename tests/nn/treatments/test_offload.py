"""Offload, saved tensors that wait in host memory: right, without races, and each wait is needed.

Only storages of 64 KiB or more go to the host: streams are as large here.
"""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from tests.nn.conditions import CONDITIONS
from tests.nn.fake_device import Device, compare_on, leave_out
from tests.nn.plan.workloads import Attention, mlp, peak
from tests.nn.test_matrix import COUPLINGS

SIZE = {"width": 96, "batch": 96}  # a stream of float64 is 72 KiB


class Offloading(revlib.ReversibleSequential):
    """A stack that offloads all blocks, if nothing is said about them."""

    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        if not {"treatments", "store_last", "memory_budget"} & set(options):
            options["treatments"] = ["offload"] * len(blocks)
        super().__init__(*blocks, **options)


def leaf() -> Tensor:
    return torch.randn(512, 64, requires_grad=True)


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("coupling", ["additive", "mixed", "bdia, exact"])
def test_is_right_and_without_races(coupling: str, name: str, device: Device) -> None:
    compare_on(device, Offloading, COUPLINGS[coupling], name, **SIZE)


MIXED = ["offload", "offload", "reversible", "offload", "store", "checkpoint", "offload"]


def light() -> nn.Module:
    return nn.Sequential(nn.Linear(32, 32), nn.Tanh())


def train() -> None:
    Offloading(*[light() for _ in range(4)])(leaf()).sum().backward()


def train_beside_other_treatments() -> None:
    Offloading(*[light() for _ in MIXED], treatments=MIXED)(leaf()).sum().backward()


def go_backward_twice() -> None:
    loss = Offloading(*[light() for _ in range(3)])(leaf()).sum()
    loss.backward(retain_graph=True)
    loss.backward()


RUNS = [train, train_beside_other_treatments, go_backward_twice]


def test_each_wait_is_needed() -> None:
    """Each place where the library waits for a stream is a race in some run if it does not."""
    found = [leave_out(run) for run in RUNS]
    places = {place for each in found for place in each}
    assert places
    for place in places:
        assert any(any(each.get(place, ())) for each in found), f"{place} can be left out"


def test_the_device_holds_the_output(device: Device) -> None:
    held, peaks = [], []
    for depth in (4, 16):
        blocks = [nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64)) for _ in range(depth)]
        stack, x = Offloading(*blocks), torch.randn(256, 128, requires_grad=True)
        most, output = peak(stack, x)
        peaks.append(most / output)
        with revlib.MemoryMeter() as meter:
            y = stack(x)
            held.append(meter.live / y.nbytes)
    assert held == [1.0, 1.0]
    assert peaks[1] <= peaks[0] + 0.01


def test_a_storage_is_copied_once_and_parameters_never(device: Device) -> None:
    stack, x = Offloading(Attention(128), split_dim=2), torch.randn(4, 64, 256)
    stack(x).sum().backward()
    stream = x.nbytes // 2
    assert device.pinned.count(3 * stream) == 1  # queries, keys and values, saved as three tensors
    assert sum(device.pinned) < 10 * stream
    assert stack[0].qkv.weight.nbytes not in device.pinned  # type: ignore[union-attr, operator]


class Works(nn.Module):
    """Does much work for each byte that it saves: products with a parameter that is frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen = nn.Linear(256, 256).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        x = x.tanh()
        for _ in range(80):
            x = self.frozen(x)
        return x


@pytest.mark.parametrize("work", ["little", "much"])
def test_a_plan_offloads_where_copies_are_hidden(work: str, device: Device) -> None:
    blocks = [mlp(256) if work == "little" else Works() for _ in range(6)]
    x = torch.randn(64, 512, requires_grad=True)
    stack = revlib.ReversibleSequential(*blocks, memory_budget=0.8, offload=True)
    stack(x).sum().backward()  # measures
    assert stack.plan is not None
    assert peak(stack, x)[0] <= stack.plan.limit
    assert ("offload" in stack.plan.treatments["stack"]) == (work == "much"), stack.plan


def test_a_tensor_changed_after_it_was_saved_is_an_error(device: Device) -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.sigmoid()
            return h.mul_(2) + 1

    with pytest.raises(RuntimeError, match=r"stack.0 \(Changes\): a tensor of shape \[512, 32\] needed"):
        Offloading(Changes())(leaf())


def test_without_streams_blocks_are_stored() -> None:
    blocks, x = [mlp(4) for _ in range(3)], torch.randn(3, 8, requires_grad=True)
    stack = revlib.ReversibleSequential(*blocks, treatments=["offload", "reversible", "offload"])
    planned = revlib.ReversibleSequential(*blocks, memory_budget=0.9, offload=True)
    expected = torch.autograd.grad(revlib.CoupledSequential(*blocks)(x).square().sum(), x)
    for each in (stack, planned, planned):
        assert torch.allclose(*torch.autograd.grad(each(x).square().sum(), x), *expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(TypeError, match="offload=1: pass True or False"):
        revlib.ReversibleSequential(*blocks, offload=1)  # type: ignore[arg-type]


def test_beside_other_treatments(device: Device) -> None:
    blocks, x = [mlp(32) for _ in MIXED], leaf()
    expected = torch.autograd.grad(revlib.CoupledSequential(*blocks)(x).square().sum(), x)
    with device:
        found = torch.autograd.grad(revlib.ReversibleSequential(*blocks, treatments=MIXED)(x).square().sum(), x)
    assert torch.allclose(*found, *expected, rtol=1e-5, atol=1e-5)
    assert device.pinned and not device.races, device.races[:3]


def test_an_error_on_the_way_leaves_nothing(device: Device) -> None:
    seen = []

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.sigmoid()
            seen.append(weakref.ref(h.untyped_storage()))
            assert len(seen) < 3
            return h.sin()

    with pytest.raises(AssertionError):
        Offloading(Fails(), Fails(), Fails())(leaf())
    assert device.pinned and [ref() for ref in seen] == [None] * 3
