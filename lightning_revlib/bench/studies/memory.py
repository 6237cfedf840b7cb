"""Bytes and FLOPs of one forward and backward, by depth, ours beside the peers': exact, and free of noise.

    python benchmarks/memory.py

Bytes are over the output's: held after forward (the input left out), the peak in backward of a loss that follows,
as in training, and that of `y.backward(gradient)`, while output and gradient are held. The parameters' gradients are
there before, and are left out. FLOPs are over plain autograd's. Of what grows with depth, plain and checkpoint, the
deepest stacks with attention are left out: they take long. A peer that is not installed is left out as well:
`pip install revlib==1.7.2`. `revlib bench` has more of them, and times.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn

from lightning_revlib.bench.cell import execute
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant
from lightning_revlib.bench.measure import counts
from lightning_revlib.bench.peers import Inexpressible
from lightning_revlib.bench.workloads import Size, attention, conv, feed_forward, mlp, repeated
from lightning_revlib.nn import CoupledSequential, MemoryMeter, ReversibleSequential

DEPTHS = (4, 64, 1024)
GROWING = ("plain", "checkpoint")
NAMES = (*GROWING, "RevLib")


def ours(stack: CoupledSequential, draws: bool, chunks: int = 1) -> nn.Module:
    """By default, where drift is measured; without, the first block of a stack is not run again to its end."""
    try:
        return ReversibleSequential(*stack, **{**stack.given, "chunks": chunks})
    except ValueError as e:
        raise Inexpressible("batch norm takes its statistics over the whole batch") from e


def training_peak(module: nn.Module, x: Tensor) -> int:
    """The loss is linear and needs no bytes of its own; that of `mse_loss` is as large as its input, inside."""
    weight = torch.ones_like(x)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = None
    with MemoryMeter() as meter:
        loss = (module(x) * weight).sum()
        meter.reset_peak()
        loss.backward()
        return meter.peak


SHOWN = [
    *[c for c in CONTESTANTS if c.name in NAMES and c.installed],
    Contestant("lightning_revlib", ours, "lightning_revlib"),
    Contestant("lightning_revlib, 4 chunks", partial(ours, chunks=4), "lightning_revlib"),
]

# The blocks that take turns, the input's shape, and the dimension of it that is split.
WORKLOADS = {
    "mlp": ((mlp,), (4096, 64), 1),
    "conv": ((conv,), (32, 32, 16, 16), 1),
    "attention": ((attention,), (16, 256, 64), 2),
    "transformer (attention, feed-forward)": ((attention, feed_forward), (16, 256, 64), 2),
}


def main() -> None:
    torch.manual_seed(0)
    print(f"torch {torch.__version__}. Held / peak in training / peak of y.backward(g) / FLOPs\n")
    for workload, (makers, shape, dim) in WORKLOADS.items():
        print(f"| {workload} | " + " | ".join(f"depth {d}" for d in DEPTHS) + " |")
        print("|---" * (len(DEPTHS) + 1) + "|")
        rows: dict[str, list[str]] = {c.name: [] for c in SHOWN}
        plain = 0.0  # FLOPs of one of its blocks
        for depth in DEPTHS:
            stack = CoupledSequential(*repeated(*makers)(Size(depth, shape[dim] // 2, 0)), split_dim=dim)
            x = torch.randn(shape, requires_grad=True)
            for contestant in SHOWN:
                if depth > 64 and contestant.name in GROWING and attention in makers:
                    rows[contestant.name].append("-")
                    continue
                try:
                    module = execute(contestant, stack, draws=False)
                except Inexpressible:
                    rows[contestant.name].append("cannot")
                    continue
                held, peak, output, flops, _ = counts(module, x)
                plain = plain or flops / depth
                training = training_peak(module, x)
                bytes_ = " / ".join(f"{n / output:.2f}" for n in (held, training, peak))
                rows[contestant.name].append(f"{bytes_} / {flops / depth / plain:.3f}")
        for name, cells in rows.items():
            print(f"| {name} | " + " | ".join(cells) + " |")
        print()


if __name__ == "__main__":
    main()
