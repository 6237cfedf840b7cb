"""A run whose treatments follow from a memory budget."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, clear_autocast_cache
from torch.nn.parameter import is_lazy

from lightning_revlib.nn.coupling.base import has_gaps
from lightning_revlib.nn.engine.drift import Sentinel
from lightning_revlib.nn.internals import pytree, surrounding_hooks
from lightning_revlib.nn.plan.budget import Signature
from lightning_revlib.nn.plan.cost import StackCosts, StepCosts
from lightning_revlib.nn.plan.fingerprint import describe_step, fingerprint
from lightning_revlib.nn.plan.unshard import unsharded
from lightning_revlib.nn.state.context import autocast_kind
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import TREATMENTS, StepCost
from lightning_revlib.nn.treatments.forward import Forward
from lightning_revlib.nn.treatments.run import Run


class PlannedRun(Run):
    """A forward that follows the plan of a budget, or measures for it, with all steps reversible meanwhile.

    `stack` has a path, options, a budget and modules, and its method `close` makes the output of a run.
    """

    def __init__(self, stack: Any, treatments: Sequence[str], forward: Forward) -> None:
        super().__init__(treatments, forward)
        self.stack, self.budget = stack, stack.budget
        self.signature: Signature | None = None
        self.measured: list[StepCosts] | None = None  # if the budget does not know the stack's costs yet
        self._known: dict[Any, dict[str, StepCost]] = {}  # costs of the steps so far, by all that they depend on

    def choose(self, step: Step, a: Tensor, b: Tensor) -> str:
        if self.index == 0:
            self._begin(step, a, b)
        if self.measured is not None:
            self.measured.append(self._measure(step, a, b))
        return super().choose(step, a, b)

    def finish(self, y: Tensor) -> None:
        if self.measured is not None:
            self.budget.add(self.stack.path, self.signature, StackCosts(self.measured, y.nbytes))

    def _begin(self, step: Step, a: Tensor, b: Tensor) -> None:
        """Follow the plan from the first step on, or begin to measure; lazy modules get their parameters first."""
        if any(map(is_lazy, self.stack.parameters())):
            return
        if surrounding_hooks() is not None:
            warnings.warn(
                f"{self.stack.path}: within a block that backward runs again, or other saved-tensor hooks, its"
                f" memory_budget={self.budget.value!r} is not followed: all steps are reversible",
                stacklevel=2,
            )
            return
        if a.is_nested:
            raise TypeError(
                f"memory_budget={self.budget.value!r}: {self.stack.path} got a nested tensor, whose bytes cannot be"
                " planned; name treatments=[...] instead, or pad the input by to_padded_tensor(0.0)"
            )
        self.signature = signature_of(self.stack, step, a, b)
        treatments = self.budget.treatments(self.stack.path, self.signature, partial(fingerprint, self.stack))
        if treatments is None:
            self.measured = []
        else:
            self.treatments = treatments

    def _measure(self, step: Step, a: Tensor, b: Tensor) -> StepCosts:
        """Return the step's costs; those of a step that agrees in all they depend on are not measured again."""
        last = self.index == len(self.treatments) - 1
        kind = (self.index == 0, last, *[(t.shape, t.stride(), t.requires_grad) for t in (a, b)], *describe_step(step))
        if kind not in self._known:
            self._known[kind] = self._costs(step, a, b, last)
        return StepCosts(a.nbytes + b.nbytes, Sentinel.bytes(a), self._known[kind])

    def _costs(self, step: Step, a: Tensor, b: Tensor, last: bool) -> dict[str, StepCost]:
        """Return the step's cost among others, under each treatment that is possible."""
        options = self.stack.options
        with unsharded(step.module):
            alone = {
                name: self._cost(step, name, a, b, last)
                for name, treatment in TREATMENTS.items()
                if treatment.is_offered(options) and treatment.is_possible(step, a.device)
            }
        costs = {name: TREATMENTS[name].cost(cost, alone["store"]) for name, cost in alone.items()}
        if self.index == 0 and b.requires_grad:  # gradients: of both streams, of the input, and of the output if last
            least = (3 if last else 2) * (a.nbytes + b.nbytes)
            costs = {name: cost._replace(backward=max(cost.backward, least)) for name, cost in costs.items()}
        if "reversible" in costs and (not last or options.split_dim is not None):
            # The streams after the step, which are held, too, are the next step's or the output. Without grad none are.
            held = max(costs["reversible"].held - a.nbytes - b.nbytes, 0)
            costs["reversible"] = costs["reversible"]._replace(held=held)
        return costs

    def _cost(self, step: Step, treatment: str, a: Tensor, b: Tensor, last: bool) -> StepCost:
        """Return the step's cost alone, by the budget's model of costs."""
        step = step.again()  # whatever a run does to arguments and their graphs
        try:
            run = partial(self._run_alone, step, treatment, last)
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
            step.take_extra()  # held until now, as the caller will hold it

    def _run_alone(self, step: Step, treatment: str, last: bool, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """Run the step as the only one of a stack if it is the last, else as one with steps after it."""
        held: list[Tensor] = []  # the rebuilt streams: other steps' frames need them until backward comes to the entry
        entry = a.grad_fn or b.grad_fn
        if entry is not None:
            entry.register_prehook(lambda grads: held.clear())
        # returns what to call with the rebuilt streams
        watch = None if entry is None else lambda *before: lambda *rebuilt: held.extend(rebuilt)
        run = Run([treatment], Forward([step.module], context_fn=self.forward.context_fn, watch=watch))
        clear_autocast_cache()
        a, b = run.step(step, a, b)
        return (self.stack.close(run, a, b),) if last else run.close(a, b)


def signature_of(stack: Any, step: Step, a: Tensor, b: Tensor) -> Signature:
    """Return what the costs of the stack's steps depend on besides its modules, given its first step."""
    arguments = pytree.tree_leaves((step.args, step.kwargs))
    tensors = [a, b, *(t for t in arguments if isinstance(t, Tensor))]
    device, kind = a.device.type, autocast_kind(a.device)
    return Signature(
        tuple(size for t in tensors for size in t.shape),
        (
            *[(t.ndim, t.dtype) for t in tensors],
            step.dtype,
            a.requires_grad,
            b.requires_grad,
            has_gaps(a) or has_gaps(b),
            device,
            torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None,
            *[x for x in arguments if isinstance(x, (bool, str, type(None)))],  # a number may count steps
            *[(type(m).__qualname__, m.training) for m in stack.modules()],
            *[(p.shape, p.requires_grad) for p in stack.parameters()],
        ),
    )
