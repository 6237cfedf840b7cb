"""The memory plan: a treatment for each step of some stacks, the least work that fits a budget of bytes.

    peak = max over steps i of  outside_i + sum of held_j for j < i + peak of step i  <=  budget

A reversible step holds nothing and works most; a stored step holds most and works least. Each step's costs are counted
by `measure` in the first forward. The choice is a multiple-choice knapsack whose load is limited at each step, not only
at the end. Dynamic programming from the first step to the last keeps the pareto front of bytes held and work. Plans
follow from counts alone, so they are the same on every machine, process and day.

Tensor rematerialisation as a knapsack: Checkmate, https://arxiv.org/abs/1910.02653.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypeAlias

from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.plan.cost import StackCosts, StepCosts
from lightning_revlib.nn.plan.limit import BudgetError, MemoryBudget, limit_in_bytes

FRONT = 1024  # points that are kept of a front; of more, of those close to each other the one with the fewest bytes
REVERSIBLE = "reversible"
DRIFT = 8  # bytes of a drift, which is left of a sentinel after its step's backward
Steps: TypeAlias = Sequence[tuple[StepCosts, int]]  # of all stacks, each with the bytes that live outside of it
Point: TypeAlias = tuple[int, int, Any]  # bytes held, work, and the treatments that lead there as (last, (..., None))


@dataclass(frozen=True)
class Plan:
    """Treatments by stack, and what was counted on: `peak` bytes of `limit`; print it.

    `minimum` is the lowest possible peak, `plain` is the peak of ordinary autograd, and `work` is relative to ordinary
    autograd's.
    """

    treatments: Mapping[str, tuple[str, ...]]
    limit: int
    peak: int
    minimum: int
    plain: int
    work: float

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"

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
    stacks: Mapping[str, StackCosts], value: MemoryBudget, taken: Mapping[str, Sequence[str]] | None = None
) -> Plan:
    """Return the plan with the least work for stacks, by path in the order in which they run.

    If some treatments are `taken` already, it is the plan for the rest, or the one with the lowest peak if none fits.

    Raises:
        BudgetError: if no plan fits, with none taken.
    """
    steps = steps_with_outside(stacks)
    uniform = uniform_choices(steps)
    minimum = min(peak_and_work(steps, choice)[0] for choice in uniform.values())
    plain, plain_work = peak_and_work(steps, uniform["store"])
    limit = limit_in_bytes(value, plain)
    if limit < minimum:
        raise BudgetError(
            f"memory_budget={value!r} is {format_bytes(limit)}, and the reversible stacks need at least"
            f" {format_bytes(minimum)} for this input, {format_bytes(minimum - limit)} more; take "
            + ("a larger fraction" if isinstance(value, float) else "a smaller batch, or a larger budget")
        )
    if taken:
        restricted = {path: _restrict(stacks[path], names) for path, names in taken.items()}
        steps = steps_with_outside({**stacks, **restricted})
    best = choose_treatments(steps, limit)
    peak, work = peak_and_work(steps, best)
    chosen = iter(best)
    treatments = {path: tuple(next(chosen) for _ in stack.steps) for path, stack in stacks.items()}
    return Plan(treatments, limit, peak, minimum, plain, work / max(plain_work, 1))


def _restrict(stack: StackCosts, treatments: Sequence[str]) -> StackCosts:
    """Return a stack's costs with one treatment left for each step."""
    return stack._replace(
        steps=[step._replace(costs={t: step.costs[t]}) for step, t in zip(stack.steps, treatments, strict=True)]
    )


def steps_with_outside(stacks: Mapping[str, StackCosts]) -> Steps:
    """Return the steps of all stacks, each with the bytes that live outside of it while it is undone.

    Outside are all outputs; the gradient of its stack's output, which the costs of the last step contain already; and
    what later steps keep: a drift, further outputs, and what is left when they are undone, since frames refer to each
    other.
    """
    outside = sum(stack.output for stack in stacks.values())
    steps: list[tuple[StepCosts, int]] = []
    for stack in reversed(list(stacks.values())):
        for step in reversed(stack.steps):
            is_last = step is stack.steps[-1]
            steps.append((step, outside + (0 if is_last else stack.output)))
            kept = [cost.kept for cost in step.costs.values()]
            if (cost := step.costs.get(REVERSIBLE)) is not None:
                has_output = is_last and cost.held >= step.streams
                kept.append(cost.held - step.streams if has_output else cost.held)
            outside += max(kept) + DRIFT
    return steps[::-1]


def uniform_choices(steps: Steps) -> dict[str, list[str]]:
    """Return for each treatment the choice of it in all steps; a step that cannot have it gets its first treatment."""
    names = {treatment: None for step, _ in steps for treatment in step.costs}
    return {name: [name if name in step.costs else next(iter(step.costs)) for step, _ in steps] for name in names}


def peak_and_work(steps: Steps, treatments: Sequence[str]) -> tuple[int, int]:
    """Return the peak bytes and the work of one choice of treatments."""
    peak = held = work = 0
    for (step, outside), before, treatment in zip(steps, [None, *treatments[:-1]], treatments, strict=True):
        cost = step.costs[treatment]
        held += _boundary(step, before, treatment)
        peak = max(peak, held + cost.forward, outside + held + cost.backward)
        held, work = held + cost.held, work + cost.work
    return peak, work


def _boundary(step: StepCosts, before: str | None, treatment: str) -> int:
    """Return the bytes kept before a step: the streams if reversible steps end there, a sentinel if they begin."""
    if before == REVERSIBLE != treatment:
        return step.streams
    return step.sentinel if before != REVERSIBLE == treatment else 0


def choose_treatments(steps: Steps, limit: int) -> Sequence[str]:
    """Return the treatments with the least work within the limit; if none fits, those with the lowest peak."""
    fastest = [min(reversed(step.costs), key=lambda name: step.costs[name].work) for step, _ in steps]
    if peak_and_work(steps, fastest)[0] <= limit:
        return fastest
    choices = [*uniform_choices(steps).values(), *_search(steps, limit)]
    ranked = [(*peak_and_work(steps, choice), choice) for choice in choices]
    return min(ranked, key=lambda each: (max(each[0], limit), each[1]))[2]


def _search(steps: Steps, limit: int) -> list[list[str]]:
    """Return a list of the choice with the least work whose peak is within the limit; an empty one if none is."""
    fronts: dict[str | None, list[Point]] = {None: [(0, 0, None)]}  # by the treatment before, if it is reversible
    for step, outside in steps:
        grown: dict[str | None, list[Point]] = {}
        for (treatment, cost), (before, front) in product(step.costs.items(), fronts.items()):
            extra = _boundary(step, before, treatment)
            room = limit - max(cost.forward, outside + cost.backward) - extra
            grown.setdefault(treatment if treatment == REVERSIBLE else None, []).extend(
                (held + extra + cost.held, work + cost.work, (treatment, way))
                for held, work, way in front
                if held <= room
            )
        fronts = {kind: _pareto_front(points) for kind, points in grown.items()}
    ends = [point for front in fronts.values() for point in front]
    if not ends:
        return []
    way = min(ends, key=lambda point: (point[1], point[0]))[2]
    treatments: list[str] = []
    while way is not None:
        treatment, way = way
        treatments.append(treatment)
    return [treatments[::-1]]


def _pareto_front(points: list[Point]) -> list[Point]:
    """Return the points with less work than all that hold as little or less, at most `FRONT` of them."""
    front: list[Point] = []
    for point in sorted(points, key=lambda point: point[:2]):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    if len(front) > FRONT:
        width = max((front[-1][0] - front[0][0]) / FRONT, 1)
        buckets = {int((point[0] - front[0][0]) / width): point for point in reversed(front)}
        front = sorted(buckets.values(), key=lambda point: point[:2])
    return front
