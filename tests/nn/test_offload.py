"""Steps whose saved tensors wait in host memory: the matrix once more, on a device that finds races."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from lightning_revlib.nn.plan import profile as measure
from lightning_revlib.nn.treatments import offload
from tests.nn.conditions import CONDITIONS
from tests.nn.streams import Device, compare_on
from tests.nn.test_matrix import COUPLINGS
from tests.nn.test_plan import Attention, peak


class Offloading(revlib.ReversibleSequential):
    """All blocks, if nothing is said about them."""

    def __init__(self, *blocks: nn.Module, **options: Any) -> None:
        if not {"treatments", "store_last", "memory_budget"} & set(options):
            options["treatments"] = ["offload"] * len(blocks)
        super().__init__(*blocks, **options)


@pytest.mark.parametrize("name", CONDITIONS)
@pytest.mark.parametrize("coupling", ["additive", "mixed", "bdia, exact"])
def test_is_right_and_without_races(coupling: str, name: str, device: Device) -> None:
    compare_on(device, Offloading, COUPLINGS[coupling], name)


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


@pytest.fixture
def uncounted(device: Device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Device]:
    """Host memory that meters do not see, as on a device that is not the host."""
    monkeypatch.setattr(offload, "host_memory", lambda like: torch.from_numpy(np.empty(like.shape, np.uint8)))
    yield device


def test_the_device_holds_the_output(uncounted: Device) -> None:
    held, peaks = [], []
    for depth in (4, 16):
        stack = Offloading(*[mlp(32) for _ in range(depth)])
        most, output = peak(stack, x := torch.randn(256, 64, requires_grad=True))
        peaks.append(most / output)
        with revlib.MemoryMeter() as meter:
            y = stack(x)
            held.append(meter.live / y.nbytes)
    assert held == [1.0, 1.0]
    assert peaks[1] <= peaks[0] + 0.01


def test_a_storage_is_copied_once_and_parameters_never(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    copies: list[int] = []
    monkeypatch.setattr(offload, "host_memory", lambda like: copies.append(like.numel()) or torch.empty_like(like))
    stack = Offloading(Attention(8), split_dim=2)
    stack(
        torch.randn(2, 16, 16),
    ).sum().backward()
    stream = 2 * 16 * 8 * 4
    assert copies.count(3 * stream) == 1  # queries, keys and values, saved as three tensors
    assert sum(copies) < 10 * stream


def test_a_plan_offloads_where_copies_are_hidden(uncounted: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(256, 32, requires_grad=True)
    blocks = [mlp(16) for _ in range(6)]
    plans: dict[int, list[Any]] = {0: [], 10**6: []}
    for flops, made in plans.items():
        monkeypatch.setattr(measure, "FLOPS_A_CARRIED_BYTE", flops)
        for fraction in (0.4, 0.5, 0.7, 0.9):
            stack = revlib.ReversibleSequential(*blocks, memory_budget=fraction, offload=True)
            stack(x).sum().backward()  # measures
            assert stack.plan is not None
            assert peak(stack, x)[0] <= stack.plan.limit
            made.append(stack.plan)
    assert all("offload" not in plan.treatments["stack"] for plan in plans[10**6])
    assert sum("offload" in plan.treatments["stack"] for plan in plans[0]) >= 3
    assert all(hidden.work <= long.work for hidden, long in zip(*plans.values(), strict=True))
    assert plans[0][1].work == 1.0


def test_a_tensor_changed_after_it_was_saved_is_an_error(device: Device) -> None:
    class Changes(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.sigmoid()
            return h.mul_(2) + 1

    with pytest.raises(RuntimeError, match=r"stack.0 \(Changes\): a tensor of shape \[3, 4\] needed"):
        Offloading(Changes())(torch.randn(3, 8, requires_grad=True))


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
    blocks, x = [mlp(4) for _ in range(7)], torch.randn(3, 8, requires_grad=True)
    mixed = ["offload", "offload", "reversible", "offload", "store", "checkpoint", "offload"]
    expected = torch.autograd.grad(revlib.CoupledSequential(*blocks)(x).square().sum(), x)
    with device:
        found = torch.autograd.grad(revlib.ReversibleSequential(*blocks, treatments=mixed)(x).square().sum(), x)
    assert torch.allclose(*found, *expected, rtol=1e-5, atol=1e-6)
    assert not device.races, device.races[:3]


def test_an_error_on_the_way_leaves_nothing(device: Device) -> None:
    seen = []

    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            h = x.sigmoid()
            seen.append(weakref.ref(h.untyped_storage()))
            assert len(seen) < 3
            return h.sin()

    with pytest.raises(AssertionError):
        Offloading(Fails(), Fails(), Fails())(torch.randn(3, 8, requires_grad=True))
    assert [ref() for ref in seen] == [None] * 3
