"""A run whose treatments follow from a memory budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, clear_autocast_cache

from lightning_revlib.nn.coupling.base import has_gaps
from lightning_revlib.nn.engine.drift import Sentinel
from lightning_revlib.nn.internals import pytree, surrounding_hooks
from lightning_revlib.nn.plan.budget import Signature
from lightning_revlib.nn.plan.cost import StepCosts
from lightning_revlib.nn.plan.fingerprint import description
from lightning_revlib.nn.plan.unshard import unsharded
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import TREATMENTS, StepCost
from lightning_revlib.nn.treatments.forward import Forward
from lightning_revlib.nn.treatments.run import Run


class PlannedRun(Run):
    """A forward that follows the plan of a budget, or measures for it, with all steps reversible meanwhile.

    `stack` has a path, options, a budget, modules, and tells how its streams are joined and halved.
    """

    def __init__(self, stack: Any, treatments: Sequence[str], forward: Forward) -> None:
        super().__init__(treatments, forward)
        self.stack, self.budget = stack, stack.budget
        self.signature: Signature | None = None
        self.measured: list[StepCosts] | None = None  # if the budget does not know the stack's costs yet
        self._known: dict[Any, dict[str, StepCost]] = {}  # costs of steps that are alike

    def choose(self, step: Step, a: Tensor, b: Tensor) -> str:
        if self.index == 0:
            self._begin(step, a, b)
        if self.measured is not None:
            self.measured.append(self._measure(step, a, b))
        return super().choose(step, a, b)

    def finish(self, y: Tensor) -> None:
        if self.measured is not None:
            self.budget.add(self.stack.path, self.signature, self.measured, y.nbytes)

    def _begin(self, step: Step, a: Tensor, b: Tensor) -> None:
        if surrounding_hooks() is not None:
            warnings.warn(
                f"{self.stack.path}: within a block that backward runs again, or other saved-tensor hooks, its"
                f" memory_budget={self.budget.value!r} is not followed: all steps are reversible",
                stacklevel=2,
            )
            return
        self.signature = signature_of(self.stack, step, a, b)
        treatments = self.budget.treatments(self.stack.path, self.signature, self.stack)
        if treatments is None:
            self.measured = []
        else:
            self.treatments = treatments

    def _measure(self, step: Step, a: Tensor, b: Tensor) -> StepCosts:
        """Return the step's costs by treatment; a step that is like one before it is not measured again."""
        last = self.index == len(self.treatments) - 1
        kind = (last, *[(t.shape, t.stride(), t.requires_grad) for t in (a, b)], *description(step))
        if kind not in self._known:
            self._known[kind] = self._costs(step, a, b, last)
        return StepCosts(a.nbytes + b.nbytes, Sentinel.bytes(a), self._known[kind])

    def _costs(self, step: Step, a: Tensor, b: Tensor, last: bool) -> dict[str, StepCost]:
        excluded = set() if self.stack.options.offload else {"offload"}
        if self.forward.context_fn is not None:
            excluded.add("selective")
        possible = [
            name
            for name, treatment in TREATMENTS.items()
            if name not in excluded and treatment.is_possible(step, a.device)
        ]
        with unsharded(step.module):
            alone = {name: self._cost(step, name, a, b, last) for name in possible}
        costs = {name: TREATMENTS[name].cost(cost, alone["store"]) for name, cost in alone.items()}
        undone = costs.get("reversible")
        if undone is not None and (not last or self.stack.options.split_dim is not None):
            # What comes out, and is held, are the next step's streams, or the output.
            costs["reversible"] = undone._replace(held=undone.held - a.nbytes - b.nbytes)
        return costs

    def _cost(self, step: Step, treatment: str, a: Tensor, b: Tensor, last: bool) -> StepCost:
        try:
            run = partial(self._alone, step, treatment, last)
            cost = self.budget.cost_model(step, treatment, a, b, last=last, run=run)
            return cost if step.extra is not None else cost._replace(kept=0)
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise RuntimeError(
                f"{step.name} calls torch.utils.checkpoint with use_reentrant=True, and memory_budget="
                f"{self.budget.value!r} cannot measure that; pass use_reentrant=False there"
            ) from None
        finally:
            step.take_extra()  # until then it is held, as it will be by the caller

    def _alone(self, step: Step, treatment: str, last: bool, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """Run the step as in a stack that has it alone, or with steps after it."""
        run, stack = Run([treatment], Forward([step.module], context_fn=self.forward.context_fn)), self.stack
        clear_autocast_cache()
        a, b = run.step(step, a, b)
        if last and stack.options.split_dim is not None:
            return (run.join(a, b, stack.join, stack.halve),)
        a, b = run.close(a, b)
        return (stack.join(a, b),) if last else (a, b)


def signature_of(stack: Any, step: Step, a: Tensor, b: Tensor) -> Signature:
    """Return what the costs of the stack's steps depend on besides its modules, given its first step."""
    arguments = pytree.tree_leaves((step.args, step.kwargs))
    tensors = [t for t in arguments if isinstance(t, Tensor)]
    device = a.device.type
    return Signature(
        tuple(t.shape for t in (a, b, *tensors)),
        (
            a.dtype,
            step.dtype,
            a.requires_grad,
            b.requires_grad,
            has_gaps(a) or has_gaps(b),
            device,
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None,
            *[t.dtype for t in tensors],
            *[x for x in arguments if isinstance(x, (bool, str, type(None)))],  # a number may count steps
            *[m.training for m in stack.modules()],
            *[(p.shape, p.requires_grad) for p in stack.parameters()],
            *[type(m).__qualname__ for m in stack.modules()],
        ),
    )
