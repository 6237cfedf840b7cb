"""What an execution costs above the blocks' own work, per block and step, on tiny blocks and one thread.

    python benchmarks/overhead.py

32 tiny blocks, the contestants interleaved in one process in an order drawn each round, medians. Where
a contestant's objects lie in memory makes a tenth or more: all are built seven times, in an order drawn
anew, and the median of the seven counts. The overhead is the step's time less plain autograd's, over the
number of blocks; it contains the blocks' second run, which all but plain need. Peers that are not
installed are left out: `pip install revlib==1.7.2 revtorch==0.2.4`.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import nn

from lightning_revlib.bench.cell import execute
from lightning_revlib.bench.contestants import CONTESTANTS
from lightning_revlib.nn import CoupledSequential

DEPTH, WIDTH, BUILDS, STEPS, WARM_UP = 32, 8, 7, 50, 10
NAMES = ("plain", "checkpoint", "RevLib", "RevTorch", "lightning_revlib")
SHOWN = [c for c in CONTESTANTS if c.name in NAMES and c.installed]
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear-tanh": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
    "norm-mlp": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
    ),
    "batchnorm": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"torch {torch.__version__}, {DEPTH} blocks of width {WIDTH}, microseconds above plain a block and step\n")
    print("| | " + " | ".join(BLOCKS) + " |\n" + "|---" * (len(BLOCKS) + 1) + "|")
    rows: dict[str, list[str]] = {c.name: [] for c in SHOWN}
    for make in BLOCKS.values():
        builds = [step_times(make) for _ in range(BUILDS)]
        plain = statistics.median(build["plain"] for build in builds)
        for name, cells in rows.items():
            over = statistics.median(build[name] - build["plain"] for build in builds) / DEPTH * 1e6
            cells.append(f"{plain * 1e3:.2f} ms a step" if name == "plain" else f"{over:.0f}")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def step_times(make: Callable[[], nn.Module]) -> dict[str, float]:
    """Each contestant's median seconds of a step, on one build of the stack."""
    stack = CoupledSequential(*[make() for _ in range(DEPTH)])
    stacks = {c.name: execute(c, stack, draws=False) for c in random.sample(SHOWN, len(SHOWN))}
    x = torch.randn(16, 2 * WIDTH, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for _ in range(STEPS):
        for name, module in random.sample(list(stacks.items()), len(stacks)):  # none always follows the same other
            start = time.perf_counter()
            module(x).sum().backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[WARM_UP:]) for name, t in times.items()}


if __name__ == "__main__":
    main()
