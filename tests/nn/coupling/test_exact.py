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
    with pytest.raises(ValueError, match=r"stack\.0 \(Linear\): the stream reaches .* must stay below 16"):
        stack(torch.full((2, 8), 15.9))


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
    with pytest.raises(ValueError, match="bdia has no inverse from its output alone"):
        revlib.CoupledSequential(nn.Linear(4, 4), coupling="bdia", grid_bits=12).inverse(torch.randn(2, 8))


def test_an_empty_batch() -> None:
    stack = revlib.ReversibleSequential(nn.Linear(4, 4), nn.Linear(4, 4), grid_bits=12)
    assert stack(torch.zeros(0, 8, requires_grad=True)).shape == (0, 8)
