"""Stacks of many kinds of blocks, and what they take."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

import lightning_revlib as revlib


class Attention(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(-2, -3) for t in self.qkv(self.norm(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-2, -3).flatten(-2))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def conv(width: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.Dropout(0.1))


def pyramid() -> list[nn.Module]:
    return [conv(8), conv(8), revlib.SpaceToDepth(2), conv(32), conv(32)]


# The blocks, the input's shape, options.
STACKS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "mlp": (lambda: [mlp(16) for _ in range(6)], (256, 32), {}),
    "large": (lambda: [nn.Sequential(nn.Linear(128, 128), nn.GELU()) for _ in range(4)], (1024, 256), {}),
    "momentum": (lambda: [mlp(32) for _ in range(6)], (128, 32), {"split_dim": None, "coupling": "momentum"}),
    "bdia": (lambda: [mlp(32) for _ in range(5)], (128, 32), {"split_dim": None, "coupling": "bdia", "grid_bits": 12}),
    "affine": (lambda: [nn.Sequential(mlp(16), nn.Linear(16, 32)) for _ in range(5)], (64, 32), {"coupling": "affine"}),
    "transformer": (lambda: [f(16) for _ in range(3) for f in (Attention, mlp)], (4, 32, 32), {"split_dim": 2}),
    "conv": (pyramid, (4, 16, 8, 8), {}),
    "light end": (lambda: [conv(8), conv(8), revlib.SpaceToDepth(2), nn.Tanh()], (32, 16, 8, 8), {}),
}  # fmt: skip


def autocast(enabled: bool) -> Any:
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def peak(stack: nn.Module, x: Tensor, half: bool = False) -> tuple[int, int]:
    """Return the peak bytes of forward and backward, and the output's bytes."""
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        with autocast(half):
            y = stack(x)
        g, forward = torch.ones_like(y), meter.peak
        meter.reset_peak()
        y.backward(g)
    return max(forward, meter.peak), y.nbytes


class Counted(nn.Sequential):
    """Counts calls, outside of its attributes, which a plan looks at."""

    calls: ClassVar[Counter[int]] = Counter()

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        Counted.calls[id(self)] += 1
        return super().forward(x)


def counted(width: int, hidden: int | None = None) -> nn.Module:
    hidden = hidden or 4 * width
    return Counted(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))


def measured(run: Callable[[], Any], *stacks: Any) -> int:
    """Return how often blocks of these stacks run in a forward, beyond once each: that is for the figures of a plan."""
    blocks = [id(block) for stack in stacks for block in stack]
    before = sum(Counted.calls[block] for block in blocks)
    run()
    return sum(Counted.calls[block] for block in blocks) - before - len(blocks)
