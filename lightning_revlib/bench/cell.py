"""One cell of the benchmark: a stack of one kind and size, and a row for each contestant."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.bench import measure, timing
from lightning_revlib.bench.contestants import Contestant
from lightning_revlib.bench.measure import TOLERANCE
from lightning_revlib.bench.peers import Inexpressible
from lightning_revlib.bench.workloads import Size, Workload
from lightning_revlib.nn import CoupledSequential, ReversibleSequential
from lightning_revlib.nn.plan.budget import Budget, share_budget
from lightning_revlib.nn.plan.solver import Plan

OURS = "lightning_revlib"
BUILDS = (2, 50)  # of the last series, at least and at most
ROUNDS = 4  # with each of them


@dataclass
class Row:
    """What was found of one contestant in one cell; None is not measured, and `note` says why.

    Bytes are absolute, `flops` are those of a step, `over_plain` is the step's time over plain's with an
    interval of 95 %, and `error` the largest relative error of the gradients in float64.
    """

    workload: str
    depth: int
    width: int
    batch: int
    contestant: str
    version: str
    device: str
    dtype: str
    note: str = ""
    error: float | None = None
    held: int | None = None
    peak: int | None = None
    output: int | None = None
    flops: int | None = None
    allocated: int | None = None
    seconds: float | None = None
    over_plain: float | None = None
    over_plain_low: float | None = None
    over_plain_high: float | None = None
    per_second: float | None = None
    unit: str = ""
    reversible: bool = False
    rounds: int = 0

    @property
    def ours(self) -> bool:
        return self.contestant.startswith(OURS)

    @property
    def right(self) -> bool:
        return self.error is not None and self.error <= TOLERANCE


def cell(
    workload: Workload,
    size: Size,
    contestants: Sequence[Contestant],
    *,
    device: torch.device,
    seconds: float,
    seed: int = 0,
) -> tuple[list[Row], dict[str, list[float]]]:
    """A row for each contestant, and the times of the last series' rounds, for comparisons of one's own."""
    torch.manual_seed(seed)
    stack = workload.stack(size).to(device)
    x = workload.input(size, device=device, requires_grad=True)
    small = workload.input(size._replace(batch=2), device=device, dtype=torch.float64, requires_grad=True)
    reference = measure.gradients(copy.deepcopy(stack).double(), small)
    rows, modules = [], {}
    for contestant in contestants:
        row = Row(
            workload.name, *size, contestant.name, contestant.version, str(device),
            "bfloat16 autocast" if device.type == "cuda" else "float32",
            unit=workload.unit, reversible=contestant.reversible,
        )  # fmt: skip
        rows.append(row)
        module = examine(row, contestant, stack, x, small, reference, workload.draws)
        if module is not None:
            modules[contestant.name] = module
    first = timing.times(modules, x, seconds / 3, seed, (2, 40), warm=True) if seconds else {}
    finalists = _finalists(rows, first)
    final: dict[str, list[float]] = {name: [] for name in finalists}
    end = time.perf_counter() + seconds
    for build in range(BUILDS[1] if finalists else 0):
        if build >= BUILDS[0] and time.perf_counter() > end:
            break
        modules = {c.name: execute(c, stack, workload.draws) for c in contestants if c.name in finalists}
        for name, more in timing.times(modules, x, 0, seed + 1 + build, (ROUNDS, ROUNDS)).items():
            final[name] += more
    for row in rows:
        times = final if row.contestant in final else first
        if taken := times.get(row.contestant):
            row.seconds, row.rounds = statistics.median(taken), len(taken)
            row.per_second = size.batch * workload.units / row.seconds
            if "plain" in times:
                row.over_plain, row.over_plain_low, row.over_plain_high = timing.ratio(taken, times["plain"])
    return rows, final


def _finalists(rows: Sequence[Row], times: Mapping[str, Sequence[float]]) -> list[str]:
    """Who is timed once more, in a series of their own: plain, ours, and the two fastest of the reversible peers.

    A contestant that empties the processor's caches slows the next one down, few rounds of many do not tell 2 % from
    noise, and where its objects lie in memory makes 1 %, so that all are built anew again and again.
    """
    peers = [r.contestant for r in rows if r.reversible and r.right and r.contestant in times and not r.ours]
    peers.sort(key=lambda name: statistics.median(times[name]))
    return [name for name in ("plain", OURS, *peers[:2]) if name in times]


def examine(
    row: Row,
    contestant: Contestant,
    model: nn.Module,
    x: Tensor,
    small: Tensor,
    reference: Sequence[Tensor | None],
    draws: bool,
) -> nn.Module | None:
    """Fill in errors, bytes and FLOPs; the module that was measured, or None if the row's note says why there is none.

    `small` is an input in float64, of which ordinary autograd made `reference`.
    """
    if not contestant.installed:
        row.note = "not installed"
        return None
    try:
        module = execute(contestant, model, draws)
        measure.step(module, x)  # a first step may measure and plan
        plan = None if contestant.budget is None else plan_of(module)
        double = execute(contestant, model, draws, torch.float64, plan)
        row.error = measure.error(reference, measure.gradients(double, small))
        row.held, row.peak, row.output, row.flops, row.allocated = measure.counts(module, x)
    except Inexpressible as reason:
        row.note = f"n/a: {reason}"
    except Exception as problem:  # other libraries fail in ways of their own
        refused = contestant.budget is not None and isinstance(problem, ValueError)
        kind = "n/a" if refused else f"raises {type(problem).__name__}"
        row.note = f"{kind}: {problem}".splitlines()[0][:160]
    else:
        return module
    return None


def execute(
    contestant: Contestant, model: nn.Module, draws: bool, dtype: torch.dtype | None = None, plan: Plan | None = None
) -> nn.Module:
    """A copy of the model in which the contestant runs all stacks, by its budget, or by a plan that there is.

    Unless it is of another dtype, the parameters are the model's own, so that any number of copies fit.
    """
    shared = {id(p): p for p in model.parameters()} if dtype is None else {}
    model = copy.deepcopy(model, shared).to(dtype=dtype)
    stacks: dict[str, Any] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, CoupledSequential):
            stacks[name] = contestant.build(module, draws)
            if not name:
                model = stacks[name]
                break
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, stacks[name])
    for name, stack in stacks.items():
        if plan is not None:
            stack.treatments = plan.treatments[name]
        stack.path = name
    if contestant.budget is not None and plan is None:
        share_budget(stacks, Budget(contestant.budget))
    return model


def plan_of(model: nn.Module) -> Plan:
    """The one that its stacks share."""
    plan = next(m for m in model.modules() if isinstance(m, ReversibleSequential)).plan
    assert plan is not None
    return plan
