"""How a reversible stack executes its steps: the tape where they are undone, checkpoint or autograd where not.

Both kinds of stack use it, `ReversibleSequential` in one call and `ReversibleModuleList` layer by layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lightning_revlib.nn.coupling import Streams
from lightning_revlib.nn.drift import Sentinel
from lightning_revlib.nn.options import OnDrift, Treatment
from lightning_revlib.nn.replay import Repeatable
from lightning_revlib.nn.step import Step
from lightning_revlib.nn.tape import Recording, Tape


class Reversible:
    """What the reversible classes share: the drift of the last backward, and what to do about it."""

    path: str
    on_drift: OnDrift
    drift_tolerance: float
    context_fn: Callable[[], tuple[Any, Any]] | None
    _drift: Tensor | None = None
    _draws = True  # whether the last forward has drawn random numbers

    @property
    def drift(self) -> float | None:
        """Relative error of the input as the last backward rebuilt it; None before, or if it need not be rebuilt.

        With several reversible parts between stored or checkpointed blocks, the largest of theirs.
        """
        return None if self._drift is None else self._drift.item()

    def _arrived(self, sentinel: Sentinel, drifts: dict[int, Tensor], a: Tensor, b: Tensor) -> None:
        """Backward has rebuilt the entrance of a reversible part; `drifts` are those of the forward's parts."""
        drifts[id(sentinel)] = sentinel.measure(a, b)
        self._drift = torch.stack(list(drifts.values())).max()
        if self.on_drift == "ignore" or (drift := self._drift.item()) <= self.drift_tolerance:
            return
        message = (
            f"{self.path}: backward rebuilt the input with a relative error of {drift:.1e}, more than"
            f" drift_tolerance={self.drift_tolerance:.1e}, and gradients are as wrong; take a stabler coupling,"
            " float32 streams, grid_bits, or checkpoint some blocks by `treatments`"
        )
        if self.on_drift == "raise":
            raise RuntimeError(message)
        warnings.warn(message, stacklevel=2)


class Execution:
    """One forward of a stack. `step` for each step in turn, `close` behind the last, which must say so to `step`."""

    def __init__(self, stack: Any, compiler: Any) -> None:
        self.stack, self.compiler = stack, compiler
        self.recording: Recording | None = None
        self.drifts: dict[int, Tensor] = {}
        self.drew = False

    def step(self, step: Step, treatment: Treatment, a: Tensor, b: Tensor) -> Streams:
        """Run a step. One that is undone stays open for the next; other steps first close what is."""
        if treatment == "reversible" and step.coupling.invertible(self.stack.training):
            if self.recording is None:
                arrived = partial(self.stack._arrived, Sentinel(a, b), self.drifts)
                tape = Tape(_pair, arrived, self.compiler, self.stack.context_fn)
                self.recording = Recording(tape, a, b, self.stack._draws)
            return self.recording.step(step, a, b)
        a, b = self.close(a, b)
        return step.run(a, b, self.compiler, partial(self._checkpoint, step) if treatment == "checkpoint" else None)

    def close(self, a: Tensor, b: Tensor) -> Streams:
        """Pass what comes out of the steps that are open through the anchor."""
        if tape := self._close():
            a, b = tape.fix(a, b)
        return a, b

    def close_joined(self, join: Callable[[Tensor, Tensor], Tensor], split: Callable[[Tensor], Streams], a: Tensor,
                     b: Tensor) -> Tensor:  # fmt: skip
        """The same for a stack whose output is both streams: it is all that is held."""
        tape = self._close()
        if tape is None:
            return join(a, b)
        tape.read = lambda tensors: split(tensors[0])
        return tape.fix(join(a, b))[0]

    def _close(self) -> Tape | None:
        if self.recording is None:
            return None
        self.recording.close()
        tape, self.recording = self.recording.tape, None
        self.drew |= tape.drew
        return tape

    def _checkpoint(self, step: Step, b: Tensor, compiler: Any) -> Any:
        return checkpoint(Repeatable(step.module, step.branch, self.stack.context_fn), b, compiler, use_reentrant=False)


def _pair(tensors: Sequence[Tensor]) -> Streams:
    a, b = tensors
    return a, b
