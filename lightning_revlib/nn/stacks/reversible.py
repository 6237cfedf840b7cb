"""What the reversible classes share: the drift of the last backward, and what one forward has learnt for the next."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine.drift import Sentinel, take
from lightning_revlib.nn.plan.budget import Budget
from lightning_revlib.nn.plan.solver import Plan
from lightning_revlib.nn.stacks.options import OnDrift

REMEMBERED = ("_backwards", "_warned", "_rebuilt", "_draws", "_calls_autograd", "_counts", "_learnt_training")


class Reversible:
    """What the reversible classes share: the drift of the last backward, and what to do about it."""

    path: str
    on_drift: OnDrift
    drift_tolerance: float
    context_fn: Callable[[], tuple[Any, Any]] | None
    budget: Budget | None
    offload: bool
    overlap: bool
    listed = False  # a model calls its layers, and may do something else between them
    _backwards = 0  # how many have rebuilt an entrance
    _warned = False  # of the drift, if that is to be done once
    _rebuilt: Mapping[Sentinel, Streams] | None = None  # what the last backward rebuilt of each sample
    _draws = True  # whether the last forward has drawn random numbers
    _calls_autograd: bool | None = None  # whether any block has, in its forward; None before the first
    _counts: bool | None = None  # whether any block has changed a number among its attributes; the same
    _learnt_training = False  # whether these two are from a forward in training

    @property
    def drift(self) -> float | None:
        """Relative error of the input as the last backward rebuilt it; None before, or if it is ignored or not rebuilt.

        With several reversible parts between stored or checkpointed blocks, the largest of theirs.
        """
        return None if (drift := self._drift()) is None else drift.item()

    def _drift(self) -> Tensor | None:
        """The drift without waiting for the device."""
        if self._rebuilt is None:
            return None
        return torch.stack([sentinel.error(taken) for sentinel, taken in self._rebuilt.items()]).max()

    @property
    def plan(self) -> Plan | None:
        """The memory plan that `memory_budget` has led to; None before the first forward, or without a budget."""
        return None if self.budget is None else self.budget.plan

    def _arrived(self, sentinel: Sentinel, rebuilt: dict[Sentinel, Streams], a: Tensor, b: Tensor) -> None:
        """Backward has rebuilt the entrance of a reversible part; `rebuilt` are those of the forward's parts."""
        own = self.__dict__  # nn.Module's own way to set an attribute is ten times as long
        if not rebuilt:  # the first part of this backward
            own["_backwards"] = self._backwards + 1
        rebuilt[sentinel] = take(a, b)
        own["_rebuilt"] = rebuilt
        if self.on_drift == "warn_once" and not self._looks(a):
            return
        drift = self.drift
        if drift is None or drift <= self.drift_tolerance:
            return
        if self.on_drift == "warn_once" and math.isnan(drift) and not torch.stack(sentinel.sample).isfinite().all():
            return  # as it came
        message = (
            f"{self.path or 'the model'}: backward rebuilt the input with a relative error of {drift:.1e}, more than"
            f" drift_tolerance={self.drift_tolerance:.1e}, and gradients are as wrong; take a stabler coupling,"
            " float32 streams, grid_bits, or checkpoint some blocks by `treatments`; or a block computes something else"
            " when it runs again, from random numbers of Python's or attributes that it changes: store that one"
        )
        if self.on_drift == "raise":
            raise RuntimeError(message)
        if self.on_drift == "warn_once":
            own["_warned"] = True
        warnings.warn(message, stacklevel=2)

    def _looks(self, a: Tensor) -> bool:
        """Whether this backward is one of the few whose drift is waited for."""
        if self._warned or self._backwards & (self._backwards - 1) or type(a) is not Tensor or a.is_meta:
            return False
        return not (a.is_cuda and torch.cuda.is_current_stream_capturing())
