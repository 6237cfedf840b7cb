"""Exact mode: bit for bit, where plain streams drift."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import lightning_revlib as revlib

DEPTHS = {"additive": 1000, "midpoint": 200, "bdia": 200}


def train(stack: nn.Module, x: Tensor, autocast: bool) -> list[Tensor]:
    x = x.clone().requires_grad_()
    stack.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = stack(x)
    y.square().mean().backward()
    assert x.grad is not None
    return [y.detach(), x.grad, *[p.grad for p in stack.parameters() if p.grad is not None]]


def differing(reference: list[Tensor], tensors: list[Tensor]) -> int:
    return sum(not torch.equal(x, y) for x, y in zip(reference, tensors, strict=True))


def norm_and_mlp(depth: int) -> list[nn.Module]:
    return [nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)) for _ in range(depth)]


@pytest.mark.parametrize(("coupling", "depth"), DEPTHS.items())
def test_deep_stacks_of_bf16_blocks_bit_for_bit(coupling: str, depth: int) -> None:
    blocks, x, results = norm_and_mlp(depth), torch.randn(8, 8), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        torch.manual_seed(1)
        stack = cls(*blocks, coupling=coupling, grid_bits=10)
        results.append(train(stack, x, autocast=True))
    assert differing(*results) == 0
    assert stack.drift == 0.0


def test_without_the_grid_gradients_differ() -> None:
    peer = pytest.importorskip("revlib")
    blocks, x = norm_and_mlp(200), torch.randn(8, 8)
    makers = [revlib.CoupledSequential, revlib.ReversibleSequential, partial(peer.ReversibleSequential, split_dim=1)]
    reference, ours, theirs = (train(make(*copy.deepcopy(blocks)), x, autocast=True) for make in makers)
    assert differing(reference, ours) > 0.05 * len(reference)
    assert differing(reference, theirs) > 0.9 * len(reference)


def test_leapfrog_bit_for_bit_over_48_blocks() -> None:
    blocks = [nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)) for _ in range(48)]
    options: dict[str, Any] = {"coupling": {"name": "leapfrog", "h": 0.1}, "grid_bits": 12}
    stacks = [cls(*copy.deepcopy(blocks), **options) for cls in (revlib.CoupledSequential, revlib.ReversibleSequential)]
    assert (
        differing(
            *[train(stack, torch.randn(8, 8, generator=torch.Generator().manual_seed(2)), False) for stack in stacks]
        )
        == 0
    )


def test_the_inverse_is_exact() -> None:
    stack = revlib.CoupledSequential(*[nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(48)], grid_bits=12)
    x = (torch.randn(8, 8) * 2**12).round() / 2**12
    with torch.no_grad():
        assert torch.equal(stack.inverse(stack(x)), x)


@pytest.mark.parametrize("cls", [revlib.CoupledSequential, revlib.ReversibleSequential])
def test_leaving_the_grid_is_an_error_with_the_path(cls: type[Any]) -> None:
    stack = cls(nn.Linear(4, 4), nn.Linear(4, 4), grid_bits=20)
    with pytest.raises(
        ValueError, match=r"stack\.0 \(Linear\): the stream reaches .* must stay below 16 .* grid_bits=19"
    ):
        stack(torch.full((2, 8), 15.9))


class Loop(nn.Module):
    """Calls the layers of a list, each with its own skip connection."""

    def __init__(self, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


COUPLINGS_ON_GRIDS: list[Any] = ["additive", "bdia", "leapfrog", {"name": "momentum", "gamma": 0.25}]


@pytest.mark.parametrize("coupling", COUPLINGS_ON_GRIDS, ids=str)
def test_the_first_forward_chooses_the_grid(coupling: Any) -> None:
    x, blocks = torch.randn(7, 8) * 300, [nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8)) for _ in range(6)]
    stacks = [
        cls(*copy.deepcopy(blocks), coupling=coupling, grid_bits="auto", split_dim=None)
        for cls in (revlib.CoupledSequential, revlib.ReversibleSequential)
    ]
    model = Loop(copy.deepcopy(blocks))
    revlib.swap(model, {"layers": {"coupling": coupling, "grid_bits": "auto"}})
    for step in range(2):
        results = []
        for stack in (*stacks, model):
            torch.manual_seed(step)
            results.append(train(stack, x, autocast=False))
        assert differing(results[0], results[1]) == differing(results[0], results[2]) == 0
    bits = {stack.grid_bits for stack in (*stacks, model.layers)}
    assert len(bits) == 1
    largest = results[0][0].abs().max()
    assert 2.0 ** (24 - bits.pop()) > 3 * largest
    assert stacks[1].drift == 0.0


def test_no_grid_is_an_error_and_float64_the_way_out() -> None:
    x, blocks = torch.full((2, 4), 1e8), [nn.Linear(4, 4)]
    with pytest.raises(ValueError, match=r"stack: the streams reach .*, and grid_bits='auto' .*set stream_dtype"):
        revlib.ReversibleSequential(*blocks, grid_bits="auto", split_dim=None)(x)
    stack = revlib.ReversibleSequential(*blocks, grid_bits="auto", split_dim=None, stream_dtype=torch.float64)
    assert stack(x).shape == x.shape
    assert stack.grid_bits == 16


def test_what_cannot_be_exact_says_so() -> None:
    with pytest.raises(ValueError, match=r"invertible step 1 \(Orthogonal\) is not exact"):
        revlib.CoupledSequential(nn.Linear(4, 4), revlib.Orthogonal(4), grid_bits=12)
    stack = revlib.CoupledSequential(nn.Linear(4, 4), grid_bits=12, stream_dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"needs streams of float32 or float64, not torch\.bfloat16; set stream_dtype"):
        stack(torch.randn(2, 8))


def test_bdia_holds_one_bit_an_element_and_evaluates_as_a_residual_network() -> None:
    blocks = [nn.Sequential(nn.Linear(64, 64), nn.Tanh()) for _ in range(16)]
    stack = revlib.ReversibleSequential(*blocks, coupling="bdia", grid_bits=12, split_dim=None)
    x = torch.randn(64, 64)
    with revlib.MemoryMeter() as meter:
        y = stack(x)
        held = meter.live
    assert held < 3 * y.nbytes + 16 * (y.nbytes / 32 + 64 * 4 * 2)  # streams, output; parities and signs
    stack.eval()
    plain = (x * 2**12).round() / 2**12
    for block in blocks:
        plain = ((plain + block(plain)) * 2**12).round() / 2**12
    assert torch.equal(stack(x), plain)
    stack(x).sum().backward()
    assert all(p.grad is not None for p in stack.parameters())
    with pytest.raises(ValueError, match=r"BDIA.* has no inverse from its output alone"):
        revlib.CoupledSequential(nn.Linear(4, 4), coupling="bdia", grid_bits=12).inverse(torch.randn(2, 8))


@pytest.mark.parametrize(
    ("coupling", "depth"),
    [
        ({"name": "momentum", "gamma": 2.0**-1}, 60),
        ({"name": "momentum", "gamma": 2.0**-2}, 60),
        ({"name": "momentum", "gamma": 2.0**-3}, 60),
        ({"name": "momentum", "gamma": 2.0**-4}, 600),
        ({"name": "momentum", "gamma": 2.0**-5}, 60),
        ({"name": "momentum", "gamma": 2.0**-6}, 60),
        ({"name": "scaled", "scale": -(2.0**-3)}, 60),
    ],
)
def test_powers_of_two_bit_for_bit(coupling: dict[str, Any], depth: int) -> None:
    blocks, results = norm_and_mlp(depth), []
    for cls in (revlib.CoupledSequential, revlib.ReversibleSequential):
        stack = cls(*blocks, coupling=coupling, grid_bits=10, split_dim=None)
        results.append(train(stack, torch.linspace(-2, 2, 32).view(8, 4), autocast=True))
    assert differing(*results) == 0
    assert stack.drift == 0.0


@pytest.mark.parametrize("k", range(1, 7))
def test_a_step_holds_the_bits_that_it_would_forget(k: int) -> None:
    depth, x = 16, torch.randn(64, 64)
    options: dict[str, Any] = {"coupling": {"name": "momentum", "gamma": 2.0**-k}, "grid_bits": 12, "split_dim": None}
    stack = revlib.ReversibleSequential(*[nn.Linear(64, 64) for _ in range(depth)], **options)
    with revlib.MemoryMeter() as meter:
        y = stack(x)
        held = meter.live
    streams, kept = 2 * y.nbytes, depth * k * y.numel() // 8
    assert streams + kept <= held <= streams + kept + 4096  # and the drift's sample
    assert stack.couplings[0].kept_bits == k


def test_a_factor_that_is_no_power_of_two_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"gamma=0\.9: on the grid .* power of two; the nearest are 0\.5 and 1"):
        revlib.CoupledSequential(nn.Linear(4, 4), coupling="momentum", grid_bits=12)
    with pytest.raises(ValueError, match=r"scale=-0\.05: .* the nearest are -0\.03125 and -0\.0625"):
        revlib.CoupledSequential(nn.Linear(4, 4), coupling={"name": "scaled", "scale": -0.05}, grid_bits=12)
    with pytest.raises(ValueError, match=r"gamma=0\.0 has no inverse, and needs no grid: leave out grid_bits"):
        revlib.CoupledSequential(nn.Linear(4, 4), coupling={"name": "momentum", "gamma": 0.0}, grid_bits=12)


def test_an_empty_batch() -> None:
    for coupling in ("additive", {"name": "momentum", "gamma": 0.25}):
        stack = revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), grid_bits=12, coupling=coupling)
        assert stack(torch.zeros(0, 8, requires_grad=True)).shape == (0, 8)


def test_an_input_that_is_no_number_is_told_apart_from_a_large_one() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(2, 2), nn.Linear(2, 2), grid_bits=19)
    with pytest.raises(ValueError, match=r"stack: its input reaches nan, .*; find what makes it"):
        stack(torch.full((1, 4), float("nan")))
    with pytest.raises(ValueError, match=r"stack: its input reaches 100, .*; set grid_bits=17"):
        stack(torch.full((1, 4), 100.0))
