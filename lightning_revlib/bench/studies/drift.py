"""Measure the drift of each coupling by depth: the relative error of the input that backward rebuilds.

    revlib bench study=drift

Blocks are LayerNorm, Linear, GELU, Linear, untrained, of width 64 on 256 samples. Streams are float32. `bf16` runs
blocks in bfloat16 autocast, and `bf16 streams` has streams in bfloat16 as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_revlib.nn import ReversibleSequential

COUPLINGS: dict[str, dict[str, Any]] = {
    "additive": {},
    "additive, bf16": {},
    "additive, bf16 streams": {"stream_dtype": torch.bfloat16},
    "additive, grid_bits=12": {"grid_bits": 12},
    "affine": {"coupling": "affine"},
    "momentum(0.99)": {"coupling": {"name": "momentum", "gamma": 0.99}},
    "momentum(0.9)": {"coupling": {"name": "momentum", "gamma": 0.9}},
    "momentum(0.5)": {"coupling": {"name": "momentum", "gamma": 0.5}},
    "midpoint(0.5)": {"coupling": "midpoint"},
    "midpoint(0.1)": {"coupling": {"name": "midpoint", "h": 0.1}},
    "leapfrog(0.1)": {"coupling": {"name": "leapfrog", "h": 0.1}},
    "scaled(0.9)": {"coupling": "scaled"},
    "bdia, grid_bits=12": {"coupling": "bdia", "grid_bits": 12},
}


def block(width: int, out: int) -> nn.Module:
    """Build a pre-norm feed-forward block."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, out))


def main(*, depths: Sequence[int] = (6, 24, 96), seed: int = 0) -> None:
    """Print a table of drifts, a row for each coupling and a column for each depth."""
    print("| drift | " + " | ".join(f"depth {d}" for d in depths) + " |\n" + "|---" * (len(depths) + 1) + "|")
    for name, options in COUPLINGS.items():
        cells = []
        for depth in depths:
            torch.manual_seed(seed)
            blocks = [block(64, 128 if name == "affine" else 64) for _ in range(depth)]
            stack, x = ReversibleSequential(*blocks, **options), torch.randn(256, 128)
            with torch.autocast("cpu", torch.bfloat16, enabled="bf16" in name):
                y = stack(x)
            y.square().mean().backward()
            cells.append(f"{stack.drift:.0e}")
        print(f"| {name} | " + " | ".join(cells) + " |")
