"""Frames of invertible steps, whose module is both block and coupling, and has state of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.engine import errors
from lightning_revlib.nn.engine.tape import Frame
from lightning_revlib.nn.state.base import StateError
from lightning_revlib.nn.state.buffers import copy_of
from lightning_revlib.nn.state.entries import swapped, value_of
from lightning_revlib.nn.state.tensors import version
from lightning_revlib.nn.steps.step import Step


class InvertibleFrame(Frame):
    """An invertible step. Its inverse meets buffers as its call has left them; its second run, as they were before."""

    __slots__ = ("after",)
    after: list[tuple[nn.Module, str, Tensor]]  # buffers that the call has changed

    def run(self, step: Step, a: Tensor, b: Tensor, context: AbstractContextManager[Any]) -> tuple[Coupling, Streams]:
        """Run the step, without the context, which is for blocks."""
        modules = self.state.modules
        before = [(m, name, t, version(t)) for m in modules for name, t in m._buffers.items() if t is not None]
        out = step.couple(a, b, None)
        self.state.close()
        now = [(m, name, value_of(m._buffers, name), t, count) for m, name, t, count in before]
        self.after = [(m, name, copy_of(t)) for m, name, t, old, n in now if t is not old or version(t) != n]
        return out

    def undo(self, out: Streams, before: Streams | None = None) -> Streams:
        if before is None:
            try:
                with self.state.restore_shared(), swapped((m._buffers, name, t) for m, name, t in self.after):
                    b = self.coupling.recover(*out).detach()
                    before = self._invert(out, b, None), b
            except StateError as error:
                raise errors.of_state(self.step, error) from error
        return super().undo(out, before)
