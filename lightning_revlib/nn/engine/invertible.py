"""Frames of invertible steps, whose module is both block and coupling, and has state of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer

from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.engine import errors
from lightning_revlib.nn.engine.tape import Frame
from lightning_revlib.nn.state.base import StateError
from lightning_revlib.nn.state.buffers import copy_of
from lightning_revlib.nn.state.entries import ABSENT, Entry, swapped
from lightning_revlib.nn.state.tensors import version
from lightning_revlib.nn.steps.step import Step


class InvertibleFrame(Frame):
    """An invertible step. Its inverse meets buffers as its call has left them; its second run, as they were before."""

    __slots__ = ("after",)
    after: list[Entry]  # the buffers, of which those that the call has changed are copies

    def run(self, step: Step, a: Tensor, b: Tensor, context: AbstractContextManager[Any]) -> tuple[Coupling, Streams]:
        """Run the step, without the context, which is for blocks."""
        before = _versions(self.state.modules)
        out = step.couple(a, b, None)
        self.state.close()
        now = _versions(self.state.modules)
        changed = [m._buffers[name] for (m, name), mark in now.items() if before.get((m, name)) != mark]
        once = {id(t): t for t in changed if t is not None}  # also one with several names
        copies = {number: copy_of(t) for number, t in once.items()}
        self.after = [(m._buffers, name, copies.get(id(m._buffers[name]), m._buffers[name])) for m, name in now]
        self.after += [(m._buffers, name, ABSENT) for m, name in before.keys() - now.keys()]
        return out

    def undo(self, out: Streams, before: Streams | None = None) -> Streams:
        if before is None:
            try:
                with self.state.restore_shared(), swapped(self.after):
                    b = self.coupling.recover(*out).detach()
                    before = self._invert(out, b, None), b
            except StateError as error:
                raise errors.of_state(self.step, error) from error
        return super().undo(out, before)


def _versions(modules: Sequence[nn.Module]) -> dict[tuple[nn.Module, str], tuple[int, int]]:
    """Return each buffer's identity and version, by module and name; version 0 for one without values yet."""
    buffers = {(m, name): t for m in modules for name, t in m._buffers.items()}
    has_none = (type(None), UninitializedBuffer)
    return {key: (id(t), 0 if isinstance(t, has_none) else version(t)) for key, t in buffers.items()}
