"""Bytes and FLOPs of one forward and backward, by depth, ours beside the peers': exact, and free of noise.

    python benchmarks/memory.py

Bytes are over the output's: held after forward (the input left out), and the peak in backward with
output, its gradient and the parameters' gradients allocated. FLOPs are over plain autograd's. A peer
that is not installed is left out: `pip install revlib==1.7.2`.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lightning_revlib as revlib

DEPTHS = (4, 16, 64, 256)


class Checkpointed(nn.Module):
    """The additive coupling with `torch.utils.checkpoint` round each step."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        for block in self.blocks:
            a, b = b, checkpoint(lambda a, b, block=block: a + block(b), a, b, use_reentrant=False)
        return torch.cat((a, b), 1)


def contestants() -> dict[str, Callable[..., nn.Module]]:
    found: dict[str, Callable[..., nn.Module]] = {
        "plain": revlib.CoupledSequential,
        "checkpoint": Checkpointed,
        "lightning_revlib": revlib.ReversibleSequential,
    }
    if importlib.util.find_spec("revlib"):
        import revlib as peer

        found["RevLib 1.7.2"] = lambda *blocks: peer.ReversibleSequential(*copy.deepcopy(blocks), split_dim=1)
    return found


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(-2, -3).flatten(-2))


def mlp(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))


def conv(width: int) -> nn.Module:
    layers = (nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1, bias=False))
    return nn.Sequential(*layers, *copy.deepcopy(layers))


class Transformer(nn.Module):
    """A pre-norm block without its skip connections, on streams of shape (batch, width, length)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width))
        self.feed_forward = nn.Sequential(nn.LayerNorm(width), mlp(width))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return self.feed_forward(x + self.attention(x)).transpose(1, 2)


WORKLOADS: dict[str, tuple[Callable[[int], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, (256, 128)),
    "conv": (conv, (8, 32, 16, 16)),
    "transformer": (Transformer, (4, 128, 64)),
}


def measure(stack: nn.Module, x: Tensor) -> tuple[float, float, int | None]:
    """Held and peak over the output's bytes, and FLOPs."""
    for p in stack.parameters():
        p.grad = torch.zeros_like(p)
    with revlib.MemoryMeter() as meter:
        y = stack(x)
        held, gradient = meter.live, torch.ones_like(y)
        meter.reset_peak()
        y.backward(gradient)
        figures = held / y.nbytes, meter.peak / y.nbytes
    try:
        with FlopCounterMode(display=False) as flops:
            stack(x).sum().backward()
    except AssertionError:  # the counter's hooks cannot follow modules through RevLib's Function
        return *figures, None
    return *figures, flops.get_total_flops()


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}\n")
    for workload, (make, shape) in WORKLOADS.items():
        print(f"| {workload}, held / peak / FLOPs | " + " | ".join(f"depth {d}" for d in DEPTHS) + " |")
        print("|---" * (len(DEPTHS) + 1) + "|")
        rows: dict[str, list[str]] = {name: [] for name in contestants()}
        for depth in DEPTHS:
            blocks = [make(shape[1] // 2) for _ in range(depth)]
            x, plain = torch.randn(shape, requires_grad=True), 0
            for name, cls in contestants().items():
                held, peak, flops = measure(cls(*blocks), x)
                plain = plain or flops or 1
                rows[name].append(f"{held:.2f} / {peak:.2f} / " + (f"{flops / plain:.3f}" if flops else "-"))
        for name, cells in rows.items():
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
