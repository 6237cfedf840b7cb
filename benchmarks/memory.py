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

DEPTHS = (4, 64, 1024)


class Checkpointed(nn.Module):
    """The additive coupling with `torch.utils.checkpoint` round each step."""

    def __init__(self, *blocks: nn.Module, split_dim: int = 1) -> None:
        super().__init__()
        self.blocks, self.split_dim = nn.ModuleList(blocks), split_dim

    def forward(self, x: Tensor) -> Tensor:
        a, b = x.chunk(2, self.split_dim)
        for block in self.blocks:
            a, b = b, checkpoint(lambda a, b, block=block: a + block(b), a, b, use_reentrant=False)
        return torch.cat((a, b), self.split_dim)


def contestants() -> dict[str, Callable[..., nn.Module]]:
    found: dict[str, Callable[..., nn.Module]] = {
        "plain": revlib.CoupledSequential,
        "checkpoint": Checkpointed,
        "lightning_revlib": revlib.ReversibleSequential,
    }
    if importlib.util.find_spec("revlib"):
        import revlib as peer

        found["RevLib 1.7.2"] = lambda *blocks, split_dim=1: peer.ReversibleSequential(
            *copy.deepcopy(blocks), split_dim=split_dim
        )
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


def attention(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), Attention(width))


def feed_forward(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), mlp(width))


# The blocks that take turns, the input's shape, and the dimension of it that is split.
WORKLOADS: dict[str, tuple[tuple[Callable[[int], nn.Module], ...], tuple[int, ...], int]] = {
    "mlp": ((mlp,), (2048, 64), 1),
    "conv": ((conv,), (8, 32, 16, 16), 1),
    "attention": ((attention,), (8, 256, 64), 2),
    "transformer (attention, feed-forward)": ((attention, feed_forward), (8, 256, 64), 2),
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
    for workload, (makers, shape, dim) in WORKLOADS.items():
        print(f"| {workload}, held / peak / FLOPs | " + " | ".join(f"depth {d}" for d in DEPTHS) + " |")
        print("|---" * (len(DEPTHS) + 1) + "|")
        rows: dict[str, list[str]] = {name: [] for name in contestants()}
        for depth in DEPTHS:
            blocks = [makers[k % len(makers)](shape[dim] // 2) for k in range(depth)]
            x, plain = torch.randn(shape, requires_grad=True), 0
            for name, cls in contestants().items():
                held, peak, flops = measure(cls(*blocks, split_dim=dim), x)
                plain = plain or flops or 1
                rows[name].append(f"{held:.2f} / {peak:.2f} / " + (f"{flops / plain:.3f}" if flops else "-"))
        for name, cells in rows.items():
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
