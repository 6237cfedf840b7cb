"""The memory plan: a treatment for each step of some stacks, the least work that fits a budget of bytes.

    peak = max over steps i of  outside_i + sum of held_j for j < i + peak of step i  <=  budget

A step that is reversible holds nothing, one that is stored most; work goes the other way. What a step holds, takes at
most and works is counted by `measure` in the first forward. Then it is a multiple-choice knapsack, in which the load on
the way matters as well as at the end; it is solved from the first step to the last, keeping all pairs of bytes held and
work that no other pair beats. Plans follow from counts alone: the same on every machine, process and day.

Tensor rematerialisation as a knapsack: Checkmate, https://arxiv.org/abs/1910.02653.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lightning_revlib.nn.measure import Figures, Measured, digest
from lightning_revlib.nn.meter import format_bytes
from lightning_revlib.nn.options import MemoryBudget, Treatment, read_budget

FRONT = 1024  # pairs that are kept at a step; with more, near ones are merged to the safe side
MARGIN = 0.1  # of the free memory, which "auto" leaves
log = logging.getLogger("lightning_revlib")


class Signature(NamedTuple):
    """What a stack's figures depend on besides its modules."""

    shapes: tuple[torch.Size, ...]
    rest: tuple[Any, ...]  # dtypes, modes

    def covers(self, other: Signature) -> bool:
        """Whether the other takes no more bytes."""
        return self.rest == other.rest and all(
            len(x) == len(y) and all(m >= n for m, n in zip(x, y, strict=True))
            for x, y in zip(self.shapes, other.shapes, strict=True)
        )


@dataclass(frozen=True)
class Plan:
    """Treatments by stack, and what was counted on: `peak` bytes of `limit`; print it.

    `minimum` is the least peak and `plain` that of ordinary autograd; `work` is over ordinary autograd's.
    """

    treatments: Mapping[str, tuple[Treatment, ...]]
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


@dataclass
class Budget:
    """The bytes that the activations of some stacks may take together, and the plans for them.

    `value` is a number of bytes, a text such as "2GiB", a fraction of ordinary autograd's peak, or "auto": what is free
    on the CUDA device, less a margin. `paths` are the stacks that share it; without, it is of one stack. `announce` is
    called with the text of each plan. There is a plan for each combination of signatures by which the stacks run.
    """

    value: MemoryBudget
    paths: tuple[str, ...] = ()
    announce: Callable[[str], Any] = log.info
    plan: Plan | None = None  # the last that was followed or made
    _known: dict[str, dict[Signature, tuple[list[Measured], int]]] = field(default_factory=dict)
    _last: dict[str, Signature] = field(default_factory=dict)  # by which each stack has run
    _plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)
    _digests: dict[str, str] = field(default_factory=dict)  # of the stacks whose figures are known
    _loaded: dict[str, tuple[str, dict[Signature, tuple[list[Measured], int]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_budget(self.value)

    def treatments(self, path: str, signature: Signature, stack: Any) -> tuple[Treatment, ...] | None:
        """The plan's for this stack; None if it has to be measured first."""
        if path not in self._digests:
            self._digests[path] = digest(stack)
            of, figures = self._loaded.pop(path, ("", {}))
            if of == self._digests[path]:
                self._known[path] = figures
            else:
                self._last.pop(path, None)
        known = self._known.get(path, {})
        covering = signature if signature in known else next((s for s in known if s.covers(signature)), None)
        if covering is None:
            return None
        self._last[path] = covering
        return self._follow().treatments[path]

    def add(self, path: str, signature: Signature, steps: list[Measured], output: int) -> None:
        """Note a stack's figures; with the last stack's, make a plan. ValueError if the budget is too small."""
        self._known.setdefault(path, {})[signature] = steps, output
        self._last[path] = signature
        if all(each in self._last for each in self.paths):
            try:
                self._follow()
            except ValueError:
                del self._known[path][signature]  # the next forward is to fail as well
                raise

    def state_dict(self) -> dict[str, Any]:
        """The figures of all stacks that have run, as plain data, from which the same plans follow."""
        return {
            path: {
                "digest": self._digests[path],
                "last": list(known).index(self._last[path]),
                "figures": [
                    (
                        tuple(s),
                        [(m.streams, m.sentinel, {t: tuple(f) for t, f in m.figures.items()}) for m in steps],
                        output,
                    )
                    for s, (steps, output) in known.items()
                ],
            }
            for path, known in self._known.items()
            if self._last[path] in known  # and was not too large for the budget
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take figures from `state_dict`, each for a stack that is still the same when it runs first."""
        for path, saved in state.items():
            figures = {
                Signature(*s): ([Measured(a, b, {t: Figures(*f) for t, f in by.items()}) for a, b, by in steps], output)
                for s, steps, output in saved["figures"]
            }
            self._loaded[path] = saved["digest"], figures
            self._known.pop(path, None)
            self._digests.pop(path, None)
            self._last[path] = list(figures)[saved["last"]]

    def _follow(self) -> Plan:
        """The plan for the stacks that have run, as they have run last."""
        combination = tuple(self._last.items())
        if combination not in self._plans:
            known = {**{path: figures for path, (_, figures) in self._loaded.items()}, **self._known}
            plan = make_plan({path: known[path][signature] for path, signature in combination}, self.value)
            self._plans[combination] = plan
            self.announce(str(plan))
        self.plan = self._plans[combination]
        return self.plan


def make_plan(stacks: Mapping[str, tuple[Sequence[Measured], int]], value: MemoryBudget) -> Plan:
    """The plan with the least work for stacks of so many output bytes. Raises ValueError if none fits."""
    steps = lay_out(stacks)
    choices = list({treatment: None for step, _ in steps for treatment in step.figures})
    peaks = {
        t: walk(steps, [t if t in step.figures else next(iter(step.figures)) for step, _ in steps]) for t in choices
    }
    minimum, plain = min(peak for peak, _ in peaks.values()), peaks["store"]
    limit = _limit(value, plain[0])
    best = [min(reversed(list(step.figures)), key=lambda t: step.figures[t].work) for step, _ in steps]
    if walk(steps, best)[0] > limit:
        found = _search(steps, limit)
        if found is None:
            raise ValueError(
                f"memory_budget={value!r} is {format_bytes(limit)}, and the reversible stacks need at least"
                f" {format_bytes(minimum)} for this input; take a smaller batch, or a larger budget"
            )
        best = found
    peak, work = walk(steps, best)
    chosen = iter(best)
    treatments = {path: tuple(next(chosen) for _ in measured) for path, (measured, _) in stacks.items()}
    return Plan(treatments, limit, peak, minimum, plain[0], work / max(plain[1], 1))


def lay_out(stacks: Mapping[str, tuple[Sequence[Measured], int]]) -> list[tuple[Measured, int]]:
    """The steps of all stacks, each with the bytes that live outside of it.

    They are all outputs, the gradient of its stack's output, unless the last step's figures contain it, and what later
    steps hold when they are undone, since their frames refer to each other.
    """
    outside = sum(output for _, output in stacks.values())
    steps: list[tuple[Measured, int]] = []
    for measured, output in reversed(list(stacks.values())):
        for step in reversed(measured):
            last = step is measured[-1]
            steps.insert(0, (step, outside + (0 if last else output)))
            if "reversible" in step.figures:
                held = step.figures["reversible"].held
                outside += held - step.streams if last and held >= step.streams else held  # without the anchor's
    return steps


def walk(steps: Sequence[tuple[Measured, int]], treatments: Sequence[Treatment]) -> tuple[int, int]:
    """Peak bytes and work of one choice of treatments."""
    peak = held = work = 0
    before: Treatment | None = None
    for (step, outside), treatment in zip(steps, treatments, strict=True):
        figures = step.figures[treatment]
        held += _boundary(step, before, treatment)
        peak = max(peak, held + figures.forward, outside + held + figures.backward)
        held, work, before = held + figures.held, work + figures.work, treatment
    return peak, work


def _boundary(step: Measured, before: Treatment | None, treatment: Treatment) -> int:
    """What is kept where reversible steps begin, a sample, and where they end, the streams."""
    if treatment == "reversible":
        return 0 if before == "reversible" else step.sentinel
    return step.streams if before == "reversible" else 0


def _search(steps: Sequence[tuple[Measured, int]], limit: int) -> list[Treatment] | None:
    """The treatments with the least work whose peak is within the limit, or None."""
    fronts: dict[Treatment | None, list[tuple[int, int, Any]]] = {None: [(0, 0, None)]}
    for step, outside in steps:
        grown: dict[Treatment | None, list[tuple[int, int, Any]]] = {}
        for treatment, figures in step.figures.items():
            room = limit - max(figures.forward, outside + figures.backward)
            kind = treatment if treatment == "reversible" else None
            for before, front in fronts.items():
                extra = _boundary(step, before, treatment)
                grown.setdefault(kind, []).extend(
                    (held + extra + figures.held, work + figures.work, (treatment, way))
                    for held, work, way in front
                    if held + extra <= room
                )
        fronts = {kind: _unbeaten(pairs) for kind, pairs in grown.items()}
    ends = [pair for front in fronts.values() for pair in front]
    if not ends:
        return None
    way = min(ends, key=lambda pair: (pair[1], pair[0]))[2]
    treatments: list[Treatment] = []
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


def _limit(value: MemoryBudget, plain: int) -> int:
    read = read_budget(value)
    if isinstance(read, float):
        return int(read * plain)
    if read is not None:
        return read
    if not torch.cuda.is_available():
        raise ValueError(
            "memory_budget='auto' needs a CUDA device; pass bytes, such as '2GiB', or a fraction, such as 0.5"
        )
    free, _ = torch.cuda.mem_get_info()
    cached = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    return int((free + cached) * (1 - MARGIN))


def share_budget(stacks: Mapping[str, Any], budget: Budget | None) -> None:
    """Give stacks, by path, one budget for all of them together, in place of one that they shared before.

    Stacks with a budget or treatments of their own keep them. Raises ValueError for one that overlaps.
    """
    overlapping = [path for path, stack in stacks.items() if stack.overlap]
    if budget is not None and overlapping:
        raise ValueError(
            f"{overlapping[0]}: overlap=True holds what two blocks save, memory_budget={budget.value!r} counts one:"
            " pass one of them"
        )
    sharing = {
        path: stack
        for path, stack in stacks.items()
        if (stack.budget is None or stack.budget.paths) and set(stack.treatments) == {"reversible"}
    }
    if budget is not None:
        budget.paths = tuple(sharing)
    for path, stack in sharing.items():
        stack.budget, stack.path = budget, path
