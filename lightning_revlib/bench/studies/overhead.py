"""Time the overhead of each contestant on tiny blocks, per block and step, on one thread.

    revlib bench study=overhead

Stacks have 32 tiny blocks. The contestants run in one process, in an order drawn in each round, and the median counts.
The place of a contestant's objects in memory makes a tenth of its time or more, so that each contestant is built seven
times, and the median of the builds counts. The overhead is the step's time minus plain autograd's, divided by the
number of blocks. It contains the blocks' second run, which all contestants but plain need. Peers that are not
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

DEPTH, WIDTH, WARM_UP = 32, 8, 10
NAMES = ("plain", "checkpoint", "RevLib", "RevTorch", "lightning_revlib")
COMPARED = [c for c in CONTESTANTS if c.name in NAMES and c.installed]
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear-tanh": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
    "norm-mlp": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
    ),
    "batchnorm": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
}


def main(*, builds: int = 7, steps: int = 50, threads: int = 1, seed: int = 0) -> None:
    """Print a row for each contestant and a column for each kind of block, over `builds` builds of `steps` steps."""
    torch.set_num_threads(threads)
    torch.manual_seed(seed)
    print(f"torch {torch.__version__}, {DEPTH} blocks of width {WIDTH}, microseconds above plain a block and step\n")
    print("| | " + " | ".join(BLOCKS) + " |\n" + "|---" * (len(BLOCKS) + 1) + "|")
    rows: dict[str, list[str]] = {c.name: [] for c in COMPARED}
    for make in BLOCKS.values():
        taken = [step_times(make, steps) for _ in range(builds)]
        plain = statistics.median(build["plain"] for build in taken)
        for name, cells in rows.items():
            over = statistics.median(build[name] - build["plain"] for build in taken) / DEPTH * 1e6
            cells.append(f"{plain * 1e3:.2f} ms a step" if name == "plain" else f"{over:.0f}")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


def step_times(make: Callable[[], nn.Module], steps: int) -> dict[str, float]:
    """Return each contestant's median seconds of a step, on one build of the stack."""
    stack = CoupledSequential(*[make() for _ in range(DEPTH)])
    stacks = {c.name: execute(c, stack, draws=False) for c in random.sample(COMPARED, len(COMPARED))}
    x = torch.randn(16, 2 * WIDTH, requires_grad=True)
    times: dict[str, list[float]] = {name: [] for name in stacks}
    for _ in range(steps):
        for name, module in random.sample(
            list(stacks.items()), len(stacks)
        ):  # so that no contestant always follows the same other one
            start = time.perf_counter()
            module(x).sum().backward()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t[min(WARM_UP, steps // 2) :]) for name, t in times.items()}
