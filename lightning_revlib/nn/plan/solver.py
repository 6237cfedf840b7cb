"""The memory plan: a treatment for each step of some stacks, the least work that fits a budget of bytes.

    peak = max over steps i of  outside_i + sum of held_j for j < i + peak of step i  <=  budget

A step that is reversible holds nothing, one that is stored most; work goes the other way. What a step holds, takes at
most and works is counted by `measure` in the first forward. Then it is a multiple-choice knapsack, in which the load on
the way matters as well as at the end; it is solved from the first step to the last, keeping all pairs of bytes held and
work that no other pair beats. Plans follow from counts alone: the same on every machine, process and day.

Tensor rematerialisation as a knapsack: Checkmate, https://arxiv.org/abs/1910.02653.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.plan.cost import StepCosts
from lightning_revlib.nn.plan.limit import MemoryBudget, limit_in_bytes

FRONT = 1024  # pairs that are kept at a step; with more, near ones are merged to the safe side


@dataclass(frozen=True)
class Plan:
    """Treatments by stack, and what was counted on: `peak` bytes of `limit`; print it.

    `minimum` is the least peak and `plain` that of ordinary autograd; `work` is over ordinary autograd's.
    """

    treatments: Mapping[str, tuple[str, ...]]
    limit: int
    peak: int
    minimum: int
    plain: int
    work: float

    def __str__(self) -> str:
        lines = [
            f"memory plan: {format_bytes(self.peak)} of {format_bytes(self.limit)} (at least"
            f" {format_bytes(self.minimum)}, ordinary autograd {format_bytes(self.plain)}), {self.work:.3f} x the work"
        ]
        for path, treatments in self.treatments.items():
            counts = ", ".join(f"{count} {treatment}" for treatment, count in Counter(treatments).items())
            lines.append(f"  {path}: {counts}")
        return "\n".join(lines)


def make_plan(
    stacks: Mapping[str, tuple[Sequence[StepCosts], int]],
    value: MemoryBudget,
    taken: Mapping[str, Sequence[str]] | None = None,
) -> Plan:
    """The plan with the least work for stacks of so many output bytes. Raises ValueError if none fits.

    With some treatments `taken` already, it is the plan for the rest; if none fits then, the one with the fewest bytes.
    """
    steps = lay_out(stacks)
    alike = _alike(steps)
    minimum, plain = min(walk(steps, treatments)[0] for treatments in alike.values()), walk(steps, alike["store"])
    limit = limit_in_bytes(value, plain[0])
    if limit < minimum:
        raise ValueError(
            f"memory_budget={value!r} is {format_bytes(limit)}, and the reversible stacks need at least"
            f" {format_bytes(minimum)} for this input; take a smaller batch, or a larger budget"
        )
    if taken:
        steps = lay_out({path: (_only(each, taken.get(path)), output) for path, (each, output) in stacks.items()})
        alike = _alike(steps)
    best = [min(reversed(list(step.costs)), key=lambda t: step.costs[t].work) for step, _ in steps]
    if walk(steps, best)[0] > limit:
        fitting = [treatments for treatments in alike.values() if walk(steps, treatments)[0] <= limit]
        if (found := _search(steps, limit)) is not None:
            fitting.append(found)
        best = (
            min(fitting, key=lambda treatments: walk(steps, treatments)[1])
            if fitting
            else min(alike.values(), key=lambda treatments: walk(steps, treatments)[0])
        )
    peak, work = walk(steps, best)
    chosen = iter(best)
    treatments = {path: tuple(next(chosen) for _ in measured) for path, (measured, _) in stacks.items()}
    return Plan(treatments, limit, peak, minimum, plain[0], work / max(plain[1], 1))


def _alike(steps: Sequence[tuple[StepCosts, int]]) -> dict[str, list[str]]:
    """All steps under one treatment, by it, as far as they can."""
    choices = list({treatment: None for step, _ in steps for treatment in step.costs})
    return {t: [t if t in step.costs else next(iter(step.costs)) for step, _ in steps] for t in choices}


def _only(measured: Sequence[StepCosts], taken: Sequence[str] | None) -> Sequence[StepCosts]:
    if taken is None:
        return measured
    return [m._replace(costs={t: m.costs[t]}) for m, t in zip(measured, taken, strict=True)]


def lay_out(stacks: Mapping[str, tuple[Sequence[StepCosts], int]]) -> list[tuple[StepCosts, int]]:
    """The steps of all stacks, each with the bytes that live outside of it.

    They are all outputs, the gradient of its stack's output, unless the last step's figures contain it, and what later
    steps hold when they are undone, since their frames refer to each other, or keep for their further outputs.
    """
    outside = sum(output for _, output in stacks.values())
    steps: list[tuple[StepCosts, int]] = []
    for measured, output in reversed(list(stacks.values())):
        for step in reversed(measured):
            last = step is measured[-1]
            steps.insert(0, (step, outside + (0 if last else output)))
            kept = [cost.kept for cost in step.costs.values() if cost.kept]
            if "reversible" in step.costs:
                held = step.costs["reversible"].held
                kept.append(held - step.streams if last and held >= step.streams else held)  # without what comes out
            outside += max(kept, default=0)
    return steps


def walk(steps: Sequence[tuple[StepCosts, int]], treatments: Sequence[str]) -> tuple[int, int]:
    """Peak bytes and work of one choice of treatments."""
    peak = held = work = 0
    befores = [None, *treatments[:-1]]
    samples = sum(map(_sample, (step for step, _ in steps), befores, treatments))
    for (step, outside), before, treatment in zip(steps, befores, treatments, strict=True):
        cost = step.costs[treatment]
        held += _boundary(step, before, treatment)
        samples -= _sample(step, before, treatment)
        peak = max(peak, held + cost.forward, outside + held + samples + cost.backward)
        held, work = held + cost.held, work + cost.work
    return peak, work


def _sample(step: StepCosts, before: str | None, treatment: str) -> int:
    """What stays, when it is undone, of a reversible part that begins here."""
    return step.sentinel if treatment == "reversible" and before != "reversible" else 0


def _boundary(step: StepCosts, before: str | None, treatment: str) -> int:
    """What is kept where reversible steps begin, a sample, and where they end, the streams."""
    return step.streams if before == "reversible" != treatment else _sample(step, before, treatment)


def _search(steps: Sequence[tuple[StepCosts, int]], limit: int) -> list[str] | None:
    """The treatments with the least work whose peak is within the limit, or None.

    As if what stays of later parts were there in all steps, of as many parts as there can be.
    """
    limit -= max(step.sentinel for step, _ in steps) * ((len(steps) + 1) // 2)
    fronts: dict[str | None, list[tuple[int, int, Any]]] = {None: [(0, 0, None)]}
    for step, outside in steps:
        grown: dict[str | None, list[tuple[int, int, Any]]] = {}
        for treatment, cost in step.costs.items():
            room = limit - max(cost.forward, outside + cost.backward)
            kind = treatment if treatment == "reversible" else None
            for before, front in fronts.items():
                extra = _boundary(step, before, treatment)
                grown.setdefault(kind, []).extend(
                    (held + extra + cost.held, work + cost.work, (treatment, way))
                    for held, work, way in front
                    if held + extra <= room
                )
        fronts = {kind: _unbeaten(pairs) for kind, pairs in grown.items()}
    ends = [pair for front in fronts.values() for pair in front]
    if not ends:
        return None
    way = min(ends, key=lambda pair: (pair[1], pair[0]))[2]
    treatments: list[str] = []
    while way is not None:
        treatment, way = way
        treatments.append(treatment)
    return treatments[::-1]


def _unbeaten(pairs: list[tuple[int, int, Any]]) -> list[tuple[int, int, Any]]:
    """Those with less work than all that hold as little."""
    front: list[tuple[int, int, Any]] = []
    for pair in sorted(pairs, key=lambda pair: pair[:2]):
        if not front or pair[1] < front[-1][1]:
            front.append(pair)
    if len(front) > FRONT:
        step = (front[-1][0] - front[0][0]) / FRONT
        buckets = {int((pair[0] - front[0][0]) / max(step, 1)): pair for pair in reversed(front)}  # the least bytes
        front = sorted(buckets.values(), key=lambda pair: pair[:2])
    return front
