"""Count bytes and FLOPs of one forward and backward by depth, which are exact and free of noise.

    revlib bench study=memory
    revlib bench study=memory depths=[4,16]

Bytes are over the output's: held after forward without the input, the peak in backward of a loss after the stack, as
in training, and the peak of `y.backward(gradient)`, which holds output and gradient. The parameters' gradients exist
before and are left out. FLOPs are over plain autograd's. Plain and checkpoint are not run on stacks of attention with
more than 64 blocks, since these take long. A peer that is not installed is left out: `pip install revlib==1.7.2`.
`revlib bench` has more peers, and times.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from lightning_revlib.bench.cell import execute
from lightning_revlib.bench.contestants import CONTESTANTS, Contestant
from lightning_revlib.bench.measure import counts
from lightning_revlib.bench.peers import Inexpressible
from lightning_revlib.bench.workloads import Size, attention, conv, feed_forward, mlp, repeated
from lightning_revlib.nn import CoupledSequential, MemoryMeter, swap

GROWING = ("plain", "checkpoint")
NAMES = (*GROWING, "RevLib")


def ours(stack: CoupledSequential, draws: bool, chunks: int = 1) -> nn.Module:
    """Make the stack reversible with the default options, which measure drift."""
    try:
        swap(stack, {"": {"chunks": chunks}})
    except ValueError as error:
        raise Inexpressible("batch norm takes its statistics over the whole batch") from error
    return stack


def training_peak(module: nn.Module, x: Tensor) -> int:
    """Return the peak in backward of a linear loss, which allocates no bytes of its own, unlike `mse_loss`."""
    weight = torch.ones_like(x)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    x.grad = None
    with MemoryMeter() as meter:
        loss = (module(x) * weight).sum()
        meter.reset_peak()
        loss.backward()
        return meter.peak


COMPARED = [
    *[c for c in CONTESTANTS if c.name in NAMES and c.installed],
    Contestant("lightning_revlib", ours, "lightning_revlib"),
    Contestant("lightning_revlib, 4 chunks", partial(ours, chunks=4), "lightning_revlib"),
]

# The blocks in turn, the input's shape, and the dimension that is split.
WORKLOADS = {
    "mlp": ((mlp,), (4096, 64), 1),
    "conv": ((conv,), (32, 32, 16, 16), 1),
    "attention": ((attention,), (16, 256, 64), 2),
    "transformer (attention, feed-forward)": ((attention, feed_forward), (16, 256, 64), 2),
}


def main(*, depths: Sequence[int] = (4, 64, 1024), seed: int = 0) -> None:
    """Print a table for each kind of stack, with a row for each contestant and a column for each depth."""
    torch.manual_seed(seed)
    print(f"torch {torch.__version__}. Held / peak in training / peak of y.backward(g) / FLOPs\n")
    for workload, (makers, shape, dim) in WORKLOADS.items():
        print(f"| {workload} | " + " | ".join(f"depth {d}" for d in depths) + " |")
        print("|---" * (len(depths) + 1) + "|")
        rows: dict[str, list[str]] = {c.name: [] for c in COMPARED}
        plain = 0.0  # FLOPs of one block by ordinary autograd
        for depth in depths:
            stack = CoupledSequential(*repeated(*makers)(Size(depth, shape[dim] // 2, 0)), split_dim=dim)
            x = torch.randn(shape, requires_grad=True)
            for contestant in COMPARED:
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
