"""Measure one cell of the benchmark: a stack of one kind and size, with a row for each contestant."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from lightning_revlib.bench import measure, timing
from lightning_revlib.bench.contestants import Contestant
from lightning_revlib.bench.measure import TOLERANCE
from lightning_revlib.bench.peers import Inexpressible
from lightning_revlib.bench.workloads import Size, Workload
from lightning_revlib.nn import CoupledSequential, ReversibleSequential, swap
from lightning_revlib.nn.plan.budget import Budget, share_budget
from lightning_revlib.nn.plan.solver import Plan

OURS = "lightning_revlib"
BUILDS = (2, 50)  # least and largest number of builds in the last series
ROUNDS = 4  # rounds of each build
Times: TypeAlias = dict[str, list[float]]  # seconds of each round, by contestant


@dataclass
class Row:
    """The figures of one contestant in one cell; None is not measured, and `note` gives the reason.

    Bytes are absolute. `flops` are the FLOPs of a step, `over_plain` is the step's time over plain's with an interval
    of 95 %, and `error` is the largest relative error of the gradients in float64.
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
        """Return whether the contestant is this library."""
        return self.contestant.startswith(OURS)

    @property
    def right(self) -> bool:
        """Return whether the gradients are those of ordinary autograd."""
        return self.error is not None and self.error <= TOLERANCE


def cell(
    workload: Workload,
    size: Size,
    contestants: Sequence[Contestant],
    *,
    device: torch.device,
    seconds: float,
    seed: int = 0,
) -> tuple[list[Row], Times]:
    """Return a row for each contestant, and the times of the last series' rounds for further comparisons."""
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
    names = _finalists(rows, first)
    builds = {c.name: partial(execute, c, stack, workload.draws) for c in contestants if c.name in names}
    final = _last_series(builds, x, seconds, seed)
    for row in rows:
        times = final if row.contestant in final else first
        if taken := times.get(row.contestant):
            row.seconds, row.rounds = statistics.median(taken), len(taken)
            row.per_second = size.batch * workload.units / row.seconds
            if "plain" in times:
                row.over_plain, row.over_plain_low, row.over_plain_high = timing.ratio(taken, times["plain"])
    return rows, final


def _last_series(builds: Mapping[str, Callable[[], nn.Module]], x: Tensor, seconds: float, seed: int) -> Times:
    """Time the finalists, which are built anew again and again, for `seconds` in all."""
    final: Times = {name: [] for name in builds}
    end = time.perf_counter() + seconds
    for index in range(BUILDS[1] if builds else 0):
        if index >= BUILDS[0] and time.perf_counter() > end:
            break
        modules = {name: build() for name, build in builds.items()}
        for name, more in timing.times(modules, x, 0, seed + 1 + index, (ROUNDS, ROUNDS)).items():
            final[name] += more
    return final


def _finalists(rows: Sequence[Row], times: Mapping[str, Sequence[float]]) -> list[str]:
    """Return the names of plain, ours and the two fastest reversible peers, which are timed in a series of their own.

    A series of few contestants has more rounds in the same time, and tells 2 % from noise. The place of a build's
    objects in memory makes 1 % of its time, so that each contestant is built several times.
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
    """Fill in the row's error, bytes and FLOPs, and return the module that was measured.

    `reference` is what ordinary autograd computes from `small`, an input in float64. Returns None if the contestant
    cannot run; the row's note then gives the reason.
    """
    if not contestant.installed:
        row.note = "not installed"
        return None
    try:
        module = execute(contestant, model, draws)
        measure.step(module, x)  # a first step may measure and plan
        plan = None if contestant.budget is None else plan_of(module).treatments
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
    contestant: Contestant,
    model: nn.Module,
    draws: bool,
    dtype: torch.dtype | None = None,
    treatments: Mapping[str, Sequence[str]] | None = None,
) -> nn.Module:
    """Return a copy of the model in which the contestant runs all stacks.

    Stacks follow the contestant's budget or, if they are given, `treatments` by the stack's path. Unless `dtype` is
    given, the copy shares the model's parameters, so that any number of copies fit.
    """
    shared = {id(p): p for p in model.parameters()} if dtype is None else {}
    model = copy.deepcopy(model, shared).to(dtype=dtype)
    stacks: dict[str, nn.Module] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, CoupledSequential):
            stacks[name] = contestant.build(module, draws)
            if not name:
                model = stacks[name]
                break
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, stacks[name])
    if treatments is not None:
        swap(model, {name: {"treatments": treatments[name]} for name in stacks})
    elif contestant.budget is not None:
        share_budget(stacks, Budget(contestant.budget))
    return model


def plan_of(model: nn.Module) -> Plan:
    """Return the memory plan that the model's stacks share."""
    plan = next(m for m in model.modules() if isinstance(m, ReversibleSequential)).plan
    assert plan is not None
    return plan
