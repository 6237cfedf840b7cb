"""Costs of steps by treatment: all that the solver sees, and what a model of costs has to return."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from torch import Tensor

from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import StepCost

RunStep: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, ...]]


class StepCosts(NamedTuple):
    """One step: the bytes of its streams as they come in, those of a drift sentinel, and its cost by treatment."""

    streams: int
    sentinel: int
    costs: dict[str, StepCost]


class StackCosts(NamedTuple):
    """One stack: the costs of its steps in their order, and the bytes of its output."""

    steps: Sequence[StepCosts]
    output: int


class CostModel(Protocol):
    """Returns what a step costs under a treatment, on streams like a and b.

    `run(a, b)` runs the step by itself under the treatment and returns what comes out: the streams, or, of the `last`
    step, the stack's output. `profile.measure` runs it and counts; a table or a timer could be another model.
    """

    def __call__(self, step: Step, treatment: str, a: Tensor, b: Tensor, *, last: bool, run: RunStep) -> StepCost: ...
