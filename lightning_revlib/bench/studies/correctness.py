"""Who computes the gradients of ordinary autograd: every condition of our own tests, run with every peer.

    python benchmarks/correctness.py

Prints a Markdown table. A cell compares all that the condition returns in float64 with ordinary autograd
on the same blocks: `ok` up to a relative error of 1e-12, else the largest error of outputs and gradients,
and `buffers` if theirs is larger still; `raises` or `crashes`; `n/a` where the peer has no way to express the
condition. A peer that is not installed is listed as such: `pip install revlib==1.7.2 revtorch==0.2.4`,
and `pip install --no-deps memcnn==1.5.2 momentumnet==0.10`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import sys
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor, nn

import lightning_revlib as revlib
from lightning_revlib.bench import peers

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `python benchmarks/correctness.py`
from tests.nn import conditions
from tests.nn.conditions import CONDITIONS, WIDTH, Case
from tests.nn.test_matrix import errors

Cell: TypeAlias = tuple[float, bool] | str
TOLERANCE, LOOSE = 1e-12, 1e-4  # of the tests in float64 and in float32
BETA = 0.99


class OneStream(Case):
    """A case of a stack that is not split: its input is as wide as a stream."""

    def input(self, requires_grad: bool = True, *, width: int = WIDTH) -> Tensor:
        return super().input(requires_grad, width=width)


def momentum_forward(other: Tensor, f: Tensor) -> Tensor:
    return other * BETA + f * (1 - BETA)


def momentum_inverse(out: Tensor, f: Tensor) -> Tensor:
    return (out - f * (1 - BETA)) / BETA


PAIR = {  # of RevLib's README
    "coupling_forward": [momentum_forward, revlib.additive_coupling_forward],
    "coupling_inverse": [momentum_inverse, revlib.additive_coupling_inverse],
}
MOMENTUM = {"coupling": {"name": "momentum", "gamma": 0.9}, "split_dim": None}

EXTRAS = {
    "blocks return one tensor": ("extra_outputs", "extra_outputs_first", "extra_outputs_last", "extra_outputs_alone")
}
ONE_TENSOR = {"blocks get one tensor": ("arguments_of_all_kinds", "layerwise_arguments"), **EXTRAS}
PAIRS = {"blocks come in pairs": ("odd_depth", "one_block"), **ONE_TENSOR}
UNSPLIT = {"the input is not split": ("negative_split_dim",)}
UNSPLIT_PEER = {
    "the input is not split": ("negative_split_dim", "stack_in_a_stack"),
    "arguments are the same for all blocks": ("layerwise_arguments",),
    **EXTRAS,
}


@dataclass(frozen=True)
class Contestant:
    name: str
    stack: Callable[..., nn.Module]
    package: str = "lightning_revlib"
    reference: Callable[..., nn.Module] = revlib.CoupledSequential
    options: dict[str, Any] = field(default_factory=dict)
    lacks: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what it cannot express, by the reason
    case: type[Case] = Case

    def run(self, condition: str, cls: Callable[..., nn.Module]) -> list[Tensor | None]:
        torch.manual_seed(3)
        random.seed(3)
        return ROWS[condition](self.case(cls, self.options, torch.float64, False))


CONTESTANTS = [
    Contestant("lightning_revlib", revlib.ReversibleSequential),
    Contestant("RevLib", peers.RevLib, "revlib", lacks=EXTRAS),
    Contestant("RevLib, graph mode", peers.RevLibGraph, "revlib", lacks=EXTRAS),
    Contestant("MemCNN", peers.MemCNN, "memcnn", peers.paired_reference, lacks=PAIRS),
    Contestant("RevTorch", peers.RevTorch, "revtorch", peers.SeededReference, lacks=PAIRS),
    Contestant("checkpoint", peers.Checkpointed, "torch"),
    Contestant("lightning_revlib, pair", revlib.ReversibleSequential, options=PAIR),
    Contestant("RevLib, pair", peers.RevLib, "revlib", options=PAIR, lacks=EXTRAS),
    Contestant(
        "lightning_revlib, momentum", revlib.ReversibleSequential, options=MOMENTUM, lacks=UNSPLIT, case=OneStream
    ),
    Contestant("momentumnet", peers.MomentumNet, "momentumnet", options=MOMENTUM, lacks=UNSPLIT_PEER, case=OneStream),
]


def random_numbers_afterwards(case: Case) -> list[Tensor | None]:
    CONDITIONS["dropout"](case)
    return [torch.rand(8)]


def output(case: Case) -> list[Tensor | None]:
    with torch.no_grad():
        return [case.call(case.mlp().eval(), case.input())]


ROWS = {**CONDITIONS, "random_numbers_afterwards": random_numbers_afterwards, "output": output}  # the last is not shown


def error(contestant: Contestant, condition: str) -> float | str:
    """The largest relative error, what is missing being zero, or why there is none."""
    if any(condition in names for names in contestant.lacks.values()):
        return "n/a"
    try:
        tensors = contestant.run(condition, contestant.stack)
    except peers.Inexpressible:
        return "n/a"
    except Exception:
        return "raises"
    reference = contestant.run(condition, contestant.reference)
    pairs = [
        (torch.zeros_like(y) if x is None else x, torch.zeros_like(x) if y is None else y)
        for x, y in zip_longest(reference, tensors)  # a hook that never ran has left nothing
        if x is not None or y is not None
    ]
    return torch.tensor(errors(*zip(*pairs, strict=True))).max().item()


def cell(contestant: Contestant, condition: str) -> Cell:
    """The error of outputs and gradients, and whether buffers are wrong; or why there is none."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    everything = error(contestant, condition)
    if isinstance(everything, str):
        return everything
    with patch.object(conditions, "gradients", lambda stack: [p.grad for p in stack.parameters()]):
        without_buffers = error(contestant, condition)
    assert isinstance(without_buffers, float)
    return without_buffers, everything > max(without_buffers, TOLERANCE)


def column(contestant: Contestant) -> list[Cell]:
    """All conditions, in a process of their own: peers may crash it."""
    results: list[Cell] = []
    pool = ProcessPoolExecutor(1)
    for condition in ROWS:
        try:
            results.append(pool.submit(cell, contestant, condition).result())
        except BrokenProcessPool:
            results.append("crashes")
            pool = ProcessPoolExecutor(1)
    pool.shutdown()
    assert is_right(results.pop(), LOOSE), f"{contestant.name} computes another function than its reference"
    return results


def is_right(result: Cell, tolerance: float) -> bool:
    return not isinstance(result, str) and result[0] <= tolerance and not result[1]


def shown(result: Cell) -> str:
    if isinstance(result, str):
        return result
    size, buffers_too = result
    number = "> 1000%" if size > 10 else f"{size:.0%}" if size > 0.005 else f"{size:.0e}"
    wrong = [f"**{number}**"] * (not size <= TOLERANCE) + ["buffers"] * buffers_too
    return ", ".join(wrong) or "ok"


def passes(results: list[Cell], tolerance: float) -> str:
    right = sum(is_right(result, tolerance) for result in results)
    return f"{right} / {len(results) - results.count('n/a')}"


def main() -> None:
    packages = dict.fromkeys(c.package for c in CONTESTANTS)
    found = [p for p in packages if importlib.util.find_spec(p)]
    print(", ".join(f"{p} {importlib.metadata.version(p)}" if p in found else f"{p} not installed" for p in packages))
    contestants = [c for c in CONTESTANTS if c.package in found]
    columns = [column(c) for c in contestants]
    print("\n| condition | " + " | ".join(c.name for c in contestants) + " |")
    print("|---" * (len(contestants) + 1) + "|")
    for name, results in zip(ROWS, zip(*columns, strict=True), strict=False):
        print(f"| {name} | " + " | ".join(map(shown, results)) + " |")
    for label, tolerance in (("passes / expressible", TOLERANCE), (f"within {LOOSE:.0e}", LOOSE)):
        print(f"| **{label}** | " + " | ".join(passes(results, tolerance) for results in columns) + " |")


if __name__ == "__main__":
    main()
