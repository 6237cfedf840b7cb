"""What a treatment is: a way to execute steps in a row, and to have for backward what their blocks save."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.coupling.invertible import Invertible
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.forward import Forward


class StepCost(NamedTuple):
    """Bytes that live beside the stack's output and other steps', and the work of forward and backward."""

    held: int  # between forward and backward
    forward: int  # at most in forward, the streams before and after included
    backward: int  # at most in backward, the gradients of the streams and what was held included
    work: int  # in FLOPs
    kept: int = 0  # after backward, by further outputs that somebody holds


class Treatment(ABC):
    """Executes steps in a row: one object for each row of a forward. `TREATMENTS` lists the classes by name.

    >>> class Traced(Store):  # as "store", and prints
    ...     def step(self, step, a, b):
    ...         print(step.name)
    ...         return super().step(step, a, b)
    >>> TREATMENTS["traced"] = Traced
    >>> ReversibleSequential(*blocks, treatments=["traced", *["reversible"] * 3])
    """

    dispatches_in_python = False  # each operation is looked at in Python, which takes time

    def __init__(self, forward: Forward, a: Tensor, b: Tensor) -> None:
        """Begin with the streams before the first step."""
        self.forward = forward

    @classmethod
    def is_possible(cls, step: Step, device: torch.device) -> bool:
        """Return whether the treatment fits a step; a step that it does not fit is stored."""
        return not isinstance(step.coupling, Invertible)

    @classmethod
    def is_offered(cls, options: Any) -> bool:
        """Return whether a memory plan may choose the treatment, as far as a stack's options say."""
        return True

    @abstractmethod
    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        """Run the next step, and return the streams after it."""

    def pause(self, a: Tensor, b: Tensor) -> None:  # noqa: B027 (there is nothing to do by default)
        """Take the streams after a step that may be the last, or not."""

    def close(self, a: Tensor, b: Tensor) -> None:  # noqa: B027
        """End with the streams after the last step."""

    def close_joined(self, y: Tensor, halve: Callable[[Tensor, bool], Streams]) -> None:  # noqa: B027
        """End with the stack's output, which is both streams joined; `halve(y, copy)` parts them again."""

    @classmethod
    def cost(cls, alone: StepCost, stored: StepCost) -> StepCost:
        """Return what a step costs, given what it costs by itself, and stored; offload adds what neighbours copy."""
        return alone


TREATMENTS: dict[str, type[Treatment]] = {}  # the planner tries them in this order; see `treatments/__init__.py`
