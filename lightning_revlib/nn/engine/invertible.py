"""Frames of invertible steps, whose module is both block and coupling, and has state of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.engine.tape import Frame
from lightning_revlib.nn.state.base import CallState
from lightning_revlib.nn.steps.step import Step


class InvertibleFrame(Frame):
    """An invertible step. Its inverse meets the state after its call; its second run, the state before."""

    __slots__ = ("after",)
    after: CallState

    def run(self, step: Step, a: Tensor, b: Tensor, context: AbstractContextManager[Any]) -> tuple[Coupling, Streams]:
        with context:
            out = step.couple(a, b, None)
        self.state.close()
        self.after = self.state.of_next_call(b)
        self.after.close()
        return out

    def undo(self, out: Streams, before: Streams | None = None) -> Streams:
        if before is None:
            with self.after.restore():
                b = self.coupling.recover(*out).detach()
                before = self._invert(out, b, None), b
        return super().undo(out, before)
