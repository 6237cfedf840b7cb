"""A budget of bytes for some stacks together: the costs of their steps, and the plans that follow from them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import ge
from typing import Any, NamedTuple

from lightning_revlib.nn.plan.cost import CostModel, StackCosts, StepCosts
from lightning_revlib.nn.plan.limit import MemoryBudget, read_budget
from lightning_revlib.nn.plan.profile import measure
from lightning_revlib.nn.plan.solver import Plan, make_plan
from lightning_revlib.nn.treatments.base import StepCost

log = logging.getLogger("lightning_revlib")
LOSS = "loss by chunks"  # takes part in plans like a stack of one step, under this path, if `chunk_loss` computes it


class Signature(NamedTuple):
    """What a stack's costs depend on besides its modules."""

    sizes: tuple[int, ...]  # of all dimensions of all tensors, in turn
    rest: tuple[Any, ...]  # numbers of dimensions, dtypes, modes

    def covers(self, other: Signature) -> bool:
        """Return whether a stack takes no more bytes with the other signature than with this one."""
        return self.rest == other.rest and all(map(ge, self.sizes, other.sizes))


@dataclass
class Record:
    """What a budget knows of a stack."""

    fingerprint: str
    costs: dict[Signature, StackCosts] = field(default_factory=dict)
    is_checked: bool = False  # the stack that runs under this path now has this fingerprint


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
    has_loss: bool = False  # is one of the parts that are planned
    plan: Plan | None = None  # the last that was followed or made
    _records: dict[str, Record] = field(default_factory=dict)
    _last: dict[str, Signature] = field(default_factory=dict)  # of each stack's last or expected run
    _ran: dict[str, tuple[str, ...]] = field(default_factory=dict)  # treatments of the stacks that ran in this step
    # By path and signature of a run: the signatures of all stacks in the last step that had this run.
    _steps: dict[tuple[str, Signature], dict[str, Signature]] = field(default_factory=dict)
    _plans: dict[tuple[Any, ...], Plan] = field(default_factory=dict)

    def __post_init__(self) -> None:
        read_budget(self.value)

    def treatments(self, path: str, signature: Signature, fingerprint: Callable[[], str]) -> tuple[str, ...] | None:
        """Return the plan's treatments for the steps of a stack that runs; None if it has to be measured first."""
        costs = self._checked(path, fingerprint).costs
        covering = next((s for s in (signature, *costs) if s in costs and s.covers(signature)), None)
        if covering is None:
            return None
        self._begin_run(path, covering)
        taken = {each: treatments for each, treatments in self._ran.items() if each != path}
        plan = self._plan_expected()
        if plan is not None and not taken.items() <= plan.treatments.items():
            plan = self._plan(taken)
        self._ran[path] = _all_reversible(costs[covering]) if plan is None else plan.treatments[path]
        return self._ran[path]

    def add(self, path: str, signature: Signature, costs: StackCosts) -> None:
        """Note a stack's costs; with the last stack's, make a plan.

        Raises:
            ValueError: if the budget is too small.
        """
        self._records[path].costs[signature] = costs
        self._begin_run(path, signature)
        self._ran[path] = _all_reversible(costs)
        if self._ran.keys() >= {*self.paths, *[LOSS] * self.has_loss}:
            self._plan_expected()

    def expect_loss(self) -> None:
        """Make the first plan when the costs of the loss are known, too."""
        self.has_loss = True

    @contextmanager
    def on_trial(self) -> Iterator[None]:
        """Forget at the end what is counted and planned inside."""
        before = copy.deepcopy({name: value for name, value in vars(self).items() if name != "announce"})
        try:
            yield
        finally:
            vars(self).update(before)

    def share(self, paths: Iterable[str]) -> None:
        """Attach this budget to stacks. The costs of one are trusted again when its fingerprint is found to match."""
        self.paths = tuple(paths)
        for path in self._records.keys() - {*self.paths, LOSS}:
            self.forget(path)
        for record in self._records.values():
            record.is_checked = False
        self._ran.clear()

    def forget(self, path: str) -> None:
        """Forget a stack's costs, and the plans that follow from them."""
        for known in (self._records, self._last, self._ran, *self._steps.values()):
            known.pop(path, None)  # type: ignore[attr-defined]
        self._steps = {run: step for run, step in self._steps.items() if run[0] != path}
        self._plans = {key: plan for key, plan in self._plans.items() if path not in plan.treatments}
        if self.plan is not None and path in self.plan.treatments:
            self.plan = None

    def state_dict(self) -> dict[str, Any]:
        """Return the costs of all stacks as plain data, from which the same plans follow."""
        return {
            path: {
                "fingerprint": record.fingerprint,
                "last": list(record.costs).index(self._last[path]),
                "costs": [
                    (tuple(s), [(*step[:2], {t: tuple(c) for t, c in step.costs.items()}) for step in steps], output)
                    for s, (steps, output) in record.costs.items()
                ],
            }
            for path, record in self._records.items()
            if self._last.get(path) in record.costs  # and was not too large for the budget
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take costs from `state_dict`, each for a stack that is still the same when it runs first."""
        for path, saved in state.items():
            costs = {
                Signature(*s): StackCosts(
                    [StepCosts(a, b, {t: StepCost(*c) for t, c in by.items()}) for a, b, by in steps], output
                )
                for s, steps, output in saved["costs"]
            }
            self.forget(path)
            self._records[path], self._last[path] = Record(saved["fingerprint"], costs), list(costs)[saved["last"]]

    def _checked(self, path: str, fingerprint: Callable[[], str]) -> Record:
        """Return what is known of the stack; nothing if another one had this path before."""
        record = self._records.get(path)
        if record is None or not record.is_checked:
            now = fingerprint()
            if record is None or record.fingerprint != now:
                self.forget(path)
                record = self._records[path] = Record(now)
            record.is_checked = True
        return record

    def _begin_run(self, path: str, signature: Signature) -> None:
        """Note that a stack runs, and expect the others to run as in the last step that had this run."""
        if path in self._ran:  # a new step
            step = {each: self._last[each] for each in self._ran}
            for run in step.items():
                self._steps.setdefault(run, {}).update(step)
            self._ran.clear()
        for each, expected in self._steps.get((path, signature), {}).items():
            if each not in self._ran and expected in self._records[each].costs:
                self._last[each] = expected
        self._last[path] = signature
        self._ran[path] = ()

    def _plan_expected(self) -> Plan | None:
        """Return the plan for the stacks that ran in this step and those expected; None if these do not fit together.

        Raises:
            ValueError: if those that ran do not fit.
        """
        try:
            return self._plan({})
        except ValueError:
            if expected := self._last.keys() - self._ran.keys():
                for path in expected:
                    del self._last[path]
                return None
            for path in self._ran:  # their costs cover smaller ones; and the next forward is to fail as well
                del self._records[path].costs[self._last.pop(path)]
            self._ran.clear()
            raise

    def _plan(self, taken: Mapping[str, tuple[str, ...]]) -> Plan:
        """Return the plan for the last signatures, with some treatments taken."""
        key = *self._last.items(), *taken.items()
        if key not in self._plans:
            costs = {path: self._records[path].costs[signature] for path, signature in self._last.items()}
            self._plans[key] = make_plan(costs, self.value, taken)
            self.announce(str(self._plans[key]))
        self.plan = self._plans[key]
        return self.plan


def _all_reversible(costs: StackCosts) -> tuple[str, ...]:
    """Return the all-reversible plan; "store" where a step cannot be inverted."""
    return tuple("reversible" if "reversible" in step.costs else "store" for step in costs.steps)


def share_budget(stacks: Mapping[str, Any], budget: Budget | None) -> None:
    """Give stacks, by path, one budget for all of them together, in place of one that they shared before.

    Stacks with a budget or treatments of their own keep them.

    Raises:
        ValueError: for a stack with overlap=True.
    """
    for path, stack in stacks.items():
        if budget is not None and stack.overlap:
            raise ValueError(
                f"{path}: overlap=True holds what two blocks save, memory_budget={budget.value!r} counts one:"
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
