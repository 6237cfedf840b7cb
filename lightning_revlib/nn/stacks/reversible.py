"""What the reversible stacks share: how a forward runs, the drift of the last backward, and what to do about it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lightning_revlib.nn.engine.drift import Sentinel
from lightning_revlib.nn.internals import graph_task
from lightning_revlib.nn.plan.planner import PlannedRun
from lightning_revlib.nn.plan.solver import Plan
from lightning_revlib.nn.stacks.options import StackOptions
from lightning_revlib.nn.stacks.stack import Stack
from lightning_revlib.nn.treatments.forward import Forward, OnEntrance
from lightning_revlib.nn.treatments.run import Run

run_eagerly = partial(
    torch.compiler.disable,
    recursive=False,
    reason="fullgraph=True: a reversible stack is no part of a graph, and compiles each of its blocks by itself; leave"
    " fullgraph out",
)


class DriftHistory:
    """What the last backward of a stack has rebuilt, and whether a user was warned of its drift.

    It knows no stack: one that is restored between forward and backward has another class by then.
    """

    def __init__(self) -> None:
        self.backwards = 0  # how many have rebuilt an entrance
        self.task = -1  # the last of them
        self.drifts: list[Tensor] = []  # of all entrances that it has rebuilt, of one forward or several
        self.warned = False

    def forget(self) -> None:
        self.drifts = []

    def measure(self) -> Tensor | None:
        """Return the drift without waiting for the device, the largest of all; None if nothing was rebuilt."""
        return torch.stack(self.drifts).max() if self.drifts else None

    def watch(self, options: StackOptions, path: str, a: Tensor, b: Tensor) -> OnEntrance:
        """Return what compares the streams a and b at an entrance with those that backward rebuilds.

        The comparison warns or raises as the options say.
        """
        sentinel = Sentinel(a.detach(), b.detach())

        def compare(a: Tensor, b: Tensor) -> None:
            if (task := graph_task()) != self.task or task < 0:  # -1: somebody looks at the graph, outside of any
                self.task, self.drifts, self.backwards = task, [], self.backwards + 1
            self.drifts.append(sentinel.error(a, b))
            if options.on_drift != "warn_once" or self._is_due(a):
                self._check(sentinel, options, path)

        return compare

    def _check(self, sentinel: Sentinel, options: StackOptions, path: str) -> None:
        """Warn or raise if the drift is too large, and its reason is not an input that was not finite itself."""
        drift, once = self.measure(), options.on_drift == "warn_once"
        if drift is None or (size := drift.item()) <= options.drift_tolerance:
            return
        if once and math.isnan(size) and not sentinel.sums.isfinite().all():
            return
        message = (
            f"{path or 'the model'}: backward rebuilt the input with a relative error of {size:.1e}, more than"
            f" drift_tolerance={options.drift_tolerance:.1e}, and gradients are as wrong. If it is rounding, take a"
            " stabler coupling, float32 streams, grid_bits, or checkpoint some blocks by `treatments`. If a block"
            " computes something else when it runs again, from random numbers of Python's, a state in lists or objects,"
            " or a choice between values that are nearly equal, store that block, as a checkpoint hides it;"
            " grid_bits mends choices"
        )
        if options.on_drift == "raise":
            raise RuntimeError(message)
        self.warned |= once
        warnings.warn(message, stacklevel=3)

    def _is_due(self, a: Tensor) -> bool:
        """Return whether to look at this backward's drift: that of the first, the second, the fourth and so on."""
        if self.warned or self.backwards & (self.backwards - 1) or type(a) is not Tensor or a.is_meta:
            return False
        return not (a.is_cuda and torch.cuda.is_current_stream_capturing())


class Reversible(Stack):
    """A stack that runs reversibly."""

    @property
    def history(self) -> DriftHistory:
        return self.__dict__.setdefault("_history", DriftHistory())

    @property
    def drift(self) -> float | None:
        """Relative error of the input as the last backward rebuilt it; None before, or if it is ignored or not rebuilt.

        With several reversible parts between stored or checkpointed blocks, the largest of theirs.
        """
        return None if (drift := self.drift_on_device()) is None else drift.item()

    def drift_on_device(self) -> Tensor | None:
        """Return `drift` as a tensor, without waiting for the device."""
        return self.history.measure()

    @property
    def plan(self) -> Plan | None:
        """The memory plan that `memory_budget` has led to; None before the first forward, or without a budget."""
        return None if self.budget is None else self.budget.plan

    def new_run(self, blocks: Iterable[nn.Module] | None, compiler: Any, first: int = 0) -> Run:
        """Begin a forward: by the plan of a budget, or each step by its own treatment.

        It begins with the step of number `first`, without a plan unless that is 0.
        """
        options, treatments, budget = self.options, self.step_treatments(), self.budget
        if options.grid_bits == "auto":  # off the grid there may be no inverse
            treatments, budget = tuple("checkpoint" if t == "reversible" else t for t in treatments), None
        if not self.training and "reversible" in treatments:
            self._tell_what_is_stored()
        is_ignored = options.on_drift == "ignore"
        forward = Forward(
            blocks,
            compiler=compiler,
            context_fn=options.context_fn,
            overlap=options.overlap,
            batched=budget is None,  # which would be overrun
            watch=None if is_ignored else partial(self.history.watch, options, self.path),
        )
        if budget is not None and set(treatments) == {"reversible"} and not first:
            return PlannedRun(self, treatments, forward)
        # Weights that steps share get gradients to the last bit only if all steps use the same cast of them.
        return Run(treatments[first:], forward, keeps_casts=options.grid_bits is not None and budget is None)

    def _tell_what_is_stored(self) -> None:
        """Warn of couplings that have an inverse in training only; Python shows the same warning once."""
        stored = [
            coupling for coupling in self.couplings if coupling.invertible(True) and not coupling.invertible(False)
        ]
        if stored:
            warnings.warn(
                f"{self.path}: {type(stored[0]).__name__.lower()} has no inverse in evaluation mode: activations are"
                " stored; call model.train() first, or use torch.no_grad() if no gradients are needed",
                stacklevel=2,
            )

    def end_run(self, run: Run, a: Tensor, b: Tensor) -> Tensor:
        """End a forward with the streams after its last step, and return its output."""
        y = self.close(run, a, b)
        run.finish(y)
        if not run.forward.is_watched:
            self.history.forget()  # backward will measure nothing
        return y
