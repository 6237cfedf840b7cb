"""Compare every library's gradients with ordinary autograd's, under every condition of this project's tests.

    revlib bench study=correctness            # in a checkout of the repository
    revlib bench study=correctness contestants=[RevLib,MemCNN]

A cell compares all that the condition returns in float64 with ordinary autograd on the same blocks: `ok` up to a
relative error of 1e-12, else the largest error of outputs and gradients, with `buffers` if the error of buffers is
larger still; `raises` or `crashes`; `n/a` if the peer cannot express the condition. A peer that is not installed is
listed as such: `pip install revlib==1.7.2 revtorch==0.2.4`, and `pip install --no-deps memcnn==1.5.2
momentumnet==0.10`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, TypeAlias
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lightning_revlib.bench import peers
from lightning_revlib.bench.measure import error
from lightning_revlib.bench.studies import from_checkout
from lightning_revlib.nn import (
    CoupledSequential,
    ReversibleSequential,
    additive_coupling_forward,
    additive_coupling_inverse,
)

conditions = from_checkout("nn.conditions")
CONDITIONS, Case = conditions.CONDITIONS, conditions.Case
Cell: TypeAlias = tuple[float, bool] | str
Tensors: TypeAlias = list[Tensor | None]
TOLERANCE, LOOSE = 1e-12, 1e-4  # relative errors that the tests allow in float64 and in float32
BETA = 0.99


class OneStream(Case):  # type: ignore[misc, valid-type]
    """A case of a stack that is not split, whose input is as wide as a stream."""

    def input(self, requires_grad: bool = True, *, width: int = conditions.WIDTH) -> Tensor:
        """Return an input of one stream's width."""
        return super().input(requires_grad, width=width)


def momentum_forward(other: Tensor, f: Tensor) -> Tensor:
    """Combine the other stream and a block's output as RevLib's README does."""
    return other * BETA + f * (1 - BETA)


def momentum_inverse(out: Tensor, f: Tensor) -> Tensor:
    """Undo `momentum_forward`."""
    return (out - f * (1 - BETA)) / BETA


PAIR = {  # of RevLib's README
    "coupling_forward": [momentum_forward, additive_coupling_forward],
    "coupling_inverse": [momentum_inverse, additive_coupling_inverse],
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
    """A library's stack, with the reference that computes its function by ordinary autograd."""

    name: str
    stack: Callable[..., nn.Module]
    package: str = "lightning_revlib"
    reference: Callable[..., nn.Module] = CoupledSequential
    options: dict[str, Any] = field(default_factory=dict)
    lacks: Mapping[str, tuple[str, ...]] = field(
        default_factory=dict
    )  # conditions that the library cannot express, by the reason
    case: type[Any] = Case

    def run(self, condition: str, cls: Callable[..., nn.Module]) -> Tensors:
        """Return what the condition computes with stacks of a class."""
        torch.manual_seed(3)
        random.seed(3)
        return ROWS[condition](self.case(cls, self.options, torch.float64, False))


CONTESTANTS = [
    Contestant("lightning_revlib", ReversibleSequential),
    Contestant("RevLib", peers.RevLib, "revlib", lacks=EXTRAS),
    Contestant("RevLib, graph mode", peers.RevLibGraph, "revlib", lacks=EXTRAS),
    Contestant("MemCNN", peers.MemCNN, "memcnn", peers.paired_reference, lacks=PAIRS),
    Contestant("RevTorch", peers.RevTorch, "revtorch", peers.SeededReference, lacks=PAIRS),
    Contestant("checkpoint", peers.Checkpointed, "torch"),
    Contestant("lightning_revlib, pair", ReversibleSequential, options=PAIR),
    Contestant("RevLib, pair", peers.RevLib, "revlib", options=PAIR, lacks=EXTRAS),
    Contestant("lightning_revlib, momentum", ReversibleSequential, options=MOMENTUM, lacks=UNSPLIT, case=OneStream),
    Contestant("momentumnet", peers.MomentumNet, "momentumnet", options=MOMENTUM, lacks=UNSPLIT_PEER, case=OneStream),
]


def random_numbers_afterwards(case: Any) -> Tensors:
    """Return the random numbers that are drawn after a step."""
    CONDITIONS["dropout"](case)
    return [torch.rand(8)]


def output(case: Any) -> Tensors:
    """Return the output without gradients, which shows that contestant and reference compute the same function."""
    with torch.no_grad():
        return [case.call(case.mlp().eval(), case.input())]


ROWS = {
    **CONDITIONS,
    "random_numbers_afterwards": random_numbers_afterwards,
    "output": output,
}  # the last row is checked, not printed


def largest_error(contestant: Contestant, condition: str) -> float | str:
    """Return the largest relative error, with zero for a missing tensor, or the reason why there is none."""
    if any(condition in names for names in contestant.lacks.values()):
        return "n/a"
    try:
        tensors = contestant.run(condition, contestant.stack)
    except peers.Inexpressible:
        return "n/a"
    except Exception:
        return "raises"
    reference = contestant.run(condition, contestant.reference)
    expected, found = [], []
    for x, y in zip_longest(reference, tensors):  # a hook that never ran has returned nothing
        if (shape := y if x is None else x) is not None:
            expected.append(torch.zeros_like(shape).double() if x is None else x.detach().double())
            found.append(y)
    return error(expected, found)


def cell(contestant: Contestant, condition: str) -> Cell:
    """Return the error of outputs and gradients and whether buffers are wrong, or the reason why there is none."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    everything = largest_error(contestant, condition)
    if isinstance(everything, str):
        return everything
    with patch.object(conditions.Case, "gradients", lambda self, stack: [p.grad for p in stack.parameters()]):
        without_buffers = largest_error(contestant, condition)
    assert isinstance(without_buffers, float)
    return without_buffers, everything > max(without_buffers, TOLERANCE)


def column(contestant: Contestant) -> list[Cell]:
    """Return the cells of all conditions, from a process of their own, since peers may crash it."""
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
    """Return whether a cell's errors are within the tolerance."""
    return not isinstance(result, str) and result[0] <= tolerance and not result[1]


def as_text(result: Cell) -> str:
    """Return a cell of the table."""
    if isinstance(result, str):
        return result
    size, buffers_too = result
    number = "> 1000%" if size > 10 else f"{size:.0%}" if size > 0.005 else f"{size:.0e}"
    wrong = [f"**{number}**"] * (not size <= TOLERANCE) + ["buffers"] * buffers_too
    return ", ".join(wrong) or "ok"


def passes(results: Sequence[Cell], tolerance: float) -> str:
    """Return the number of right cells and of expressible ones."""
    right = sum(is_right(result, tolerance) for result in results)
    return f"{right} / {len(results) - results.count('n/a')}"


def main(*, contestants: Sequence[str] | str | None = None) -> None:
    """Print a Markdown table, with a row for each condition and a column for each contestant, all by default."""
    names = [contestants] if isinstance(contestants, str) else contestants or [c.name for c in CONTESTANTS]
    if unknown := set(names) - {c.name for c in CONTESTANTS}:
        raise ValueError(
            f"contestants={sorted(unknown)}: unknown; take some of {', '.join(c.name for c in CONTESTANTS)}"
        )
    chosen = [c for c in CONTESTANTS if c.name in names]
    packages = dict.fromkeys(c.package for c in chosen)
    found = [p for p in packages if importlib.util.find_spec(p)]
    print(", ".join(f"{p} {importlib.metadata.version(p)}" if p in found else f"{p} not installed" for p in packages))
    chosen = [c for c in chosen if c.package in found]
    columns = [column(c) for c in chosen]
    print("\n| condition | " + " | ".join(c.name for c in chosen) + " |")
    print("|---" * (len(chosen) + 1) + "|")
    for name, results in zip(ROWS, zip(*columns, strict=True), strict=False):
        print(f"| {name} | " + " | ".join(map(as_text, results)) + " |")
    for label, tolerance in (("passes / expressible", TOLERANCE), (f"within {LOOSE:.0e}", LOOSE)):
        print(f"| **{label}** | " + " | ".join(passes(results, tolerance) for results in columns) + " |")
