"""A budget of bytes for some stacks together: what is known of their steps, and the plans that follow from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lightning_revlib.nn.plan.cost import CostModel, StepCosts
from lightning_revlib.nn.plan.fingerprint import fingerprint
from lightning_revlib.nn.plan.limit import MemoryBudget, read_budget
from lightning_revlib.nn.plan.profile import measure
from lightning_revlib.nn.plan.solver import Plan, make_plan
from lightning_revlib.nn.treatments.base import StepCost

log = logging.getLogger("lightning_revlib")


class Signature(NamedTuple):
    """What a stack's figures depend on besides its modules."""

    shapes: tuple[torch.Size, ...]
    rest: tuple[Any, ...]  # dtypes, modes

    def covers(self, other: Signature) -> bool:
        """Whether the other takes no more bytes."""
        return (
            self.rest == other.rest
            and [len(x) for x in self.shapes] == [len(y) for y in other.shapes]
            and all(m >= n for x, y in zip(self.shapes, other.shapes, strict=True) for m, n in zip(x, y, strict=True))
        )


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
    cost_model: CostModel = measure
    plan: Plan | None = None  # the last that was followed or made
    _known: dict[str, dict[Signature, tuple[list[StepCosts], int]]] = field(default_factory=dict)
    _last: dict[str, Signature] = field(default_factory=dict)  # by which each stack has run, or is expected to
    _ran: dict[str, tuple[str, ...]] = field(default_factory=dict)  # what stacks have done in this step
    _together: dict[tuple[str, Signature], dict[str, Signature]] = field(default_factory=dict)  # in a step with this
    _plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)
    _fingerprints: dict[str, str] = field(default_factory=dict)  # of the stacks whose figures are known
    _checked: set[str] = field(default_factory=set)  # whose fingerprint is that of the stack that runs
    _loaded: dict[str, tuple[str, dict[Signature, tuple[list[StepCosts], int]]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_budget(self.value)

    def treatments(self, path: str, signature: Signature, stack: Any) -> tuple[str, ...] | None:
        """The plan's for this stack; None if it has to be measured first."""
        if path not in self._checked:
            self._check(path, fingerprint(stack))
        known = self._known.get(path, {})
        covering = signature if signature in known else next((s for s in known if s.covers(signature)), None)
        if covering is None:
            return None
        self._arrive(path, covering)
        taken = {each: treatments for each, treatments in self._ran.items() if each != path}
        plan = self._follow()
        if plan is not None and not taken.items() <= plan.treatments.items():
            plan = self._plan(taken)
        self._ran[path] = _undone(known[covering][0]) if plan is None else plan.treatments[path]
        return self._ran[path]

    def _check(self, path: str, now: str) -> None:
        of, figures = self._loaded.pop(path, (self._fingerprints.get(path), self._known.get(path, {})))
        if of == now:
            self._known[path] = figures
        else:
            self.forget(path)
        self._fingerprints[path] = now
        self._checked.add(path)

    def forget(self, path: str) -> None:
        """All that is known of a stack, and the plans that follow from it."""
        for known in (self._known, self._last, self._fingerprints, self._loaded, self._ran, *self._together.values()):
            known.pop(path, None)  # type: ignore[attr-defined]
        self._together = {key: step for key, step in self._together.items() if key[0] != path}
        self._checked.discard(path)
        self._plans = {key: plan for key, plan in self._plans.items() if path not in plan.treatments}
        if self.plan is not None and path in self.plan.treatments:
            self.plan = None

    def share(self, paths: Iterable[str]) -> None:
        """Be that of these stacks from now on, which may be others than before under the same paths."""
        self.paths = tuple(paths)
        for path in {*self._last, *self._fingerprints} - {*self.paths}:
            self.forget(path)
        self._checked.clear()
        self._ran.clear()

    def add(self, path: str, signature: Signature, steps: list[StepCosts], output: int) -> None:
        """Note a stack's figures; with the last stack's, make a plan. ValueError if the budget is too small."""
        self._known.setdefault(path, {})[signature] = steps, output
        self._arrive(path, signature)
        self._ran[path] = _undone(steps)
        if all(each in self._ran for each in self.paths):
            self._follow()

    def _arrive(self, path: str, signature: Signature) -> None:
        """Note that a stack runs; those behind it are expected by what they have run by with it."""
        if path in self._ran:  # a new step
            step = {each: self._last[each] for each in self._ran}
            for run in step.items():
                self._together.setdefault(run, {}).update(step)
            self._ran.clear()
        for each, expected in self._together.get((path, signature), {}).items():
            if each not in self._ran and expected in self._figures(each):
                self._last[each] = expected
        self._last[path] = signature
        self._ran[path] = ()

    def state_dict(self) -> dict[str, Any]:
        """The figures of all stacks that have run, as plain data, from which the same plans follow."""
        return {
            path: {
                "fingerprint": self._fingerprints[path],
                "last": list(known).index(self._last[path]),
                "figures": [
                    (
                        tuple(s),
                        [(m.streams, m.sentinel, {t: tuple(f) for t, f in m.costs.items()}) for m in steps],
                        output,
                    )
                    for s, (steps, output) in known.items()
                ],
            }
            for path, known in self._known.items()
            if self._last.get(path) in known  # and was not too large for the budget
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take figures from `state_dict`, each for a stack that is still the same when it runs first."""
        for path, saved in state.items():
            figures = {
                Signature(*s): (
                    [StepCosts(a, b, {t: StepCost(*c) for t, c in by.items()}) for a, b, by in steps],
                    output,
                )
                for s, steps, output in saved["figures"]
            }
            self.forget(path)
            self._loaded[path] = saved["fingerprint"], figures
            self._last[path] = list(figures)[saved["last"]]

    def _figures(self, path: str) -> dict[Signature, tuple[list[StepCosts], int]]:
        return self._known.get(path) or self._loaded.get(path, ("", {}))[1]

    def _follow(self) -> Plan | None:
        """The plan for the stacks that have run in this step and those that are expected; None if these do not fit."""
        try:
            return self._plan({})
        except ValueError:
            expected = self._last.keys() - self._ran.keys()
            for path in expected or self._ran:
                signature = self._last.pop(path)
                if not expected:  # figures that cover smaller ones; and the next forward is to fail as well
                    del self._known[path][signature]
            if expected:
                return None
            self._ran.clear()
            raise

    def _plan(self, taken: Mapping[str, tuple[str, ...]]) -> Plan:
        combination = tuple(self._last.items())
        key = combination, tuple(taken.items())
        if key not in self._plans:
            figures = {path: self._figures(path)[signature] for path, signature in combination}
            self._plans[key] = make_plan(figures, self.value, taken)
            self.announce(str(self._plans[key]))
        self.plan = self._plans[key]
        return self.plan


def _undone(steps: Sequence[StepCosts]) -> tuple[str, ...]:
    """What steps do that are all to be undone."""
    return tuple("reversible" if "reversible" in step.costs else "store" for step in steps)


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
        budget.share(sharing)
    for path, stack in sharing.items():
        stack.budget, stack.path = budget, path
