"""The largest size that fits into a memory, and the plan of stacks that have what is left of it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lightning_revlib as revlib
from lightning_revlib.accounting.fit import fill, largest
from lightning_revlib.accounting.step import count, program_of


@pytest.mark.parametrize("memory", [999, 1000, 12_345, 10**9])
@pytest.mark.parametrize("first", [1, 16, 1000])
def test_the_largest_size(memory: int, first: int) -> None:
    def bytes_of(size: int) -> int:
        return max(100 + 7 * size, 900 + 3 * size, 9 * size - 500)

    found = largest(bytes_of, memory, first)
    assert found is not None and bytes_of(found) <= memory < 1.1 * bytes_of(found)


def test_nothing_fits() -> None:
    assert largest(lambda size: 100 + size, 50, 4) is None


def test_multiples() -> None:
    assert largest(lambda size: 10 * size, 1234, 8, unit=8) == 120


def stack(depth: int) -> nn.Module:
    blocks = [nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)) for _ in range(depth)]
    return revlib.ReversibleSequential(*blocks)


@pytest.mark.parametrize("depths", [[12], [4, 4, 4]], ids=["one", "three"])
def test_stacks_get_what_is_left(depths: list[int]) -> None:
    model, batch = nn.Sequential(nn.Linear(4, 32), *map(stack, depths)), torch.randn(256, 4)
    program = program_of(model, batch, torch.optim.AdamW, None)
    least = count(program).highest.total
    revlib.restore(model)
    most = count(program).highest.total
    revlib.swap(model)
    assert fill(program, least - 1000) is None
    for share in (0.2, 0.5, 0.8):
        limit = int(least + share * (most - least))
        found = fill(program, limit)
        assert found is not None and 0.85 * limit < found[0] <= limit
        assert found[1].startswith("memory plan") and found[1].count("memory plan") == 1
