"""What an execution costs above the blocks' own work, per block and step, on tiny blocks and one thread.

    python benchmarks/overhead.py

32 tiny blocks, the contestants interleaved in one process, medians. The overhead is the step's time
less plain autograd's, over the number of blocks; it contains the blocks' second run, which all but
plain need. Peers that are not installed are left out: `pip install revlib==1.7.2 revtorch==0.2.4`.
"""

from __future__ import annotations

import copy
import importlib.util
import statistics
import time
from collections.abc import Callable

import torch
from memory import Checkpointed, contestants
from torch import nn

DEPTH, WIDTH, STEPS, WARM_UP = 32, 8, 120, 20
BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "linear-tanh": lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()),
    "mlp": lambda: nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)),
    "norm-mlp": lambda: nn.Sequential(
        nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)
    ),
    "batchnorm": lambda: nn.Sequential(nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH)),
}


class RevTorch(nn.Module):
    """Pairs of blocks, as RevTorch takes them."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        import revtorch

        pairs = zip(blocks[::2], blocks[1::2], strict=True)
        steps = [revtorch.ReversibleBlock(f, g, split_along_dim=1) for f, g in pairs]
        self.stack = revtorch.ReversibleSequence(nn.ModuleList(steps), eagerly_discard_variables=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.stack(x)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found = {**contestants(), "checkpoint": Checkpointed}
    if importlib.util.find_spec("revtorch"):
        found["RevTorch 0.2.4"] = RevTorch
    print(f"torch {torch.__version__}, {DEPTH} blocks of width {WIDTH}, microseconds above plain a block and step\n")
    print("| | " + " | ".join(BLOCKS) + " |\n" + "|---" * (len(BLOCKS) + 1) + "|")
    rows: dict[str, list[str]] = {name: [] for name in found}
    for make in BLOCKS.values():
        blocks = [make() for _ in range(DEPTH)]
        stacks = {name: cls(*copy.deepcopy(blocks)) for name, cls in found.items()}
        x = torch.randn(16, 2 * WIDTH, requires_grad=True)
        times: dict[str, list[float]] = {name: [] for name in stacks}
        for _ in range(STEPS):
            for name, stack in stacks.items():
                start = time.perf_counter()
                stack(x).sum().backward()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(t[WARM_UP:]) for name, t in times.items()}
        for name, seconds in medians.items():
            over = (seconds - medians["plain"]) / DEPTH * 1e6
            rows[name].append(f"{seconds * 1e3:.2f} ms a step" if name == "plain" else f"{over:.0f}")
    for name, cells in rows.items():
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
