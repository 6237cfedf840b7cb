"""What a reversible stack holds and computes: bytes at any depth, and FLOPs."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_revlib as revlib


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.GELU(), nn.Conv2d(width, width, 3, padding=1))


def noisy(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm1d(width), nn.Linear(width, width), nn.Dropout(0.1), nn.Tanh())


KINDS = {"mlp": (mlp, (128, 128)), "conv": (conv, (16, 16, 16, 16)), "noisy": (noisy, (1024, 64))}


def measure(stack: nn.Module, x: Tensor) -> tuple[float, float]:
    """Return the bytes held after forward and the peak of backward, over the output's bytes."""
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = stack(x)
        held = meter.live
        g = torch.ones_like(y)
        meter.reset_peak()
        y.backward(g)
        return held / y.nbytes, meter.peak / y.nbytes


@pytest.mark.parametrize("kind", KINDS)
def test_memory_is_the_output_at_any_depth(kind: str) -> None:
    make, shape = KINDS[kind]
    x = torch.randn(shape, requires_grad=True)
    figures = [measure(revlib.ReversibleSequential(*[make(shape[1] // 2)] * depth), x) for depth in (4, 16, 64)]
    assert all(held == pytest.approx(1.0, rel=0.01) for held, _ in figures)
    assert all(peak == pytest.approx(figures[0][1], rel=0.01) for _, peak in figures)


LARGE, SMALL = 4096, 2048  # rows of 64 numbers: half of them are 512 KiB, from which on the engine frees halves early


@pytest.mark.parametrize("chunks", [1, 4])
def test_a_training_step_holds_neither_the_output_nor_its_gradient_for_long(chunks: int) -> None:
    peaks = []
    for rows, depth in ((LARGE, 1), (LARGE, 2), (LARGE, 8), (SMALL, 8)):
        x, weight = torch.randn(rows, 64, requires_grad=True), torch.randn(rows, 64)
        stack = revlib.ReversibleSequential(*[mlp(32) for _ in range(depth)], chunks=chunks)
        for p in stack.parameters():
            p.grad = torch.zeros_like(p)
        with revlib.MemoryMeter() as meter:
            loss = (stack(x) * weight).sum()
            meter.reset_peak()
            loss.backward()
        peaks.append(meter.peak / x.nbytes)
    assert peaks[0] == peaks[1] == peaks[2] < peaks[3] - 0.45


@pytest.mark.parametrize(
    "blocks", [[nn.Linear(32, 32)], [mlp(32), mlp(32)], [nn.Tanh(), mlp(32)], [mlp(32), nn.Tanh()]]
)
def test_what_the_caller_holds_is_not_copied(blocks: list[nn.Module]) -> None:
    figures = [
        measure(revlib.ReversibleSequential(*blocks), torch.randn(rows, 64, requires_grad=True))
        for rows in (LARGE, SMALL)
    ]
    assert figures[0] == pytest.approx(figures[1], abs=0.05)


def test_weights_that_autocast_has_cast_do_not_pile_up() -> None:
    peaks = []
    for depth in (4, 32):
        stack, x = revlib.ReversibleSequential(*[mlp(64) for _ in range(depth)]), torch.randn(4, 128)
        with torch.autocast("cpu", torch.bfloat16), revlib.MemoryMeter() as meter:
            stack(x)
        peaks.append(meter.peak)
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize("kind", KINDS)
def test_peak_is_below_revlib(kind: str) -> None:
    peer = pytest.importorskip("revlib")
    make, shape = KINDS[kind]
    x, blocks = torch.randn(shape, requires_grad=True), [make(shape[1] // 2) for _ in range(8)]
    held, peak = measure(revlib.ReversibleSequential(*blocks), x)
    peer_held, peer_peak = measure(peer.ReversibleSequential(*copy.deepcopy(blocks), split_dim=1), x)
    assert held < peer_held
    assert peak < (0.95 if kind == "noisy" else 0.85) * peer_peak


class Repeat(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, x), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coupling", [name for name, cls in revlib.COUPLINGS.items() if not cls.needs_grid])
def test_flops_are_four_thirds(kind: str, coupling: str) -> None:
    make, shape = KINDS[kind]
    blocks = [make(shape[1] // 2) for _ in range(6)]
    if coupling == "affine":
        blocks = [nn.Sequential(block, Repeat()) for block in blocks]
    x, counts = torch.randn(shape, requires_grad=True), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        with FlopCounterMode(display=False) as flops:
            cls(*blocks, coupling=coupling)(x).sum().backward()
        counts.append(flops.get_total_flops())
    assert 3 * counts[1] == 4 * counts[0]


@pytest.mark.parametrize("stored", [0, 1, 3, 6])
def test_a_stored_block_is_not_run_again(stored: int) -> None:
    x, counts = torch.randn(64, 64, requires_grad=True), []
    stack = revlib.ReversibleSequential(*[mlp(32) for _ in range(6)], store_last=stored)
    for one in (revlib.CoupledSequential(*stack), stack):
        with FlopCounterMode(display=False) as flops:
            one(x).sum().backward()
        counts.append(flops.get_total_flops())
    assert counts[1] / counts[0] == pytest.approx((4 - stored / 6) / 3, rel=1e-12)


def test_treatments_hold_what_they_say() -> None:
    x, held = torch.randn(128, 128, requires_grad=True), {}
    for name in ("reversible", "checkpoint", "store"):
        stack = revlib.ReversibleSequential(*[mlp(64) for _ in range(8)], treatments=[name] * 8)
        held[name] = measure(stack, x)[0]
    assert held["reversible"] == pytest.approx(1, rel=0.01)
    # The output, and each block's input, half as large; the first one's is a view of x.
    assert held["checkpoint"] == pytest.approx(1 + 7 / 2, rel=0.01)
    assert held["store"] > 30


def test_memory_falls_while_a_block_is_differentiated() -> None:
    live: list[int] = []
    meter = revlib.MemoryMeter()

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, grad: Tensor) -> Tensor:
            live.append(meter.live)
            return grad

    class Probed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.GELU()) for _ in range(6)])

        def forward(self, x: Tensor) -> Tensor:
            for part in self.parts:
                x = Probe.apply(part(x))
            return x

    with meter:
        revlib.ReversibleSequential(Probed())(torch.randn(256, 16)).sum().backward()
    assert live[1:] == sorted(live[1:], reverse=True)
    assert live[-1] < live[1]


@pytest.mark.parametrize("change", ["nothing", "autocast", "eval"])
def test_each_block_runs_twice_whatever_has_changed(change: str) -> None:
    stack = revlib.ReversibleSequential(*[mlp(4) for _ in range(20)])
    runs: list[nn.Module] = []
    for block in stack:
        block.register_forward_hook(lambda block, *_: runs.append(block))
    with torch.autocast("cpu", torch.bfloat16, enabled=change == "autocast"):
        loss = stack(torch.randn(2, 8)).sum()
    stack.train(change != "eval")
    loss.backward()
    assert runs == [*stack, *reversed(list(stack))]
    assert all(m.training == (change != "eval") for m in stack.modules())


class Tells(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.tanh(), x.square().sum()


@pytest.mark.parametrize("width", [8, 8192])
def test_a_loss_on_what_blocks_return_besides_runs_each_once_more(width: int) -> None:
    blocks = [Tells() for _ in range(3)]
    stack = revlib.ReversibleSequential(*blocks, split_dim=None, coupling="midpoint")
    runs: list[int] = []
    for block in blocks:
        block.register_forward_hook(lambda *_: runs.append(1))
    _, extras = stack(torch.randn(16, width, requires_grad=True))
    sum(loss for (loss,) in extras).backward()
    assert len(runs) == 6
