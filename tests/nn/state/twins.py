"""The same blocks in a reversible stack and in one of ordinary autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import lightning_revlib as revlib

TREATMENTS = ["reversible", "checkpoint", "selective"]


def twins(make: Callable[[], nn.Module], treatment: Any) -> tuple[nn.Module, nn.Module]:
    made = []
    for _ in range(2):  # lazy modules cannot be copied
        torch.manual_seed(0)
        made.append([make() for _ in range(3)])
    return revlib.ReversibleSequential(*made[0], treatments=[treatment] * 3), revlib.CoupledSequential(*made[1])


def sample() -> Tensor:
    return torch.randn(8, 8, dtype=torch.float64, requires_grad=True)


class Masked(nn.Module):
    """Adds a mask, which ordinary autograd need not save, and multiplies by a scale, absent at first."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mask", torch.randn(4, dtype=torch.float64))
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        out = (x + self.mask).tanh()  # type: ignore[operator]
        return out if self.scale is None else out * self.scale
