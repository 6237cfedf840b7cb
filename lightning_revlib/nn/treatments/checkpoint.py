"""Treatment "checkpoint": a block's input is kept, and the block runs again when backward needs what it saves.

As `torch.utils.checkpoint` does it (https://arxiv.org/abs/1604.06174), with the state that the engine restores.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine import errors
from lightning_revlib.nn.engine.saved_tensors import Enough, SavedTensors, make_contexts
from lightning_revlib.nn.internals import surrounding_hooks
from lightning_revlib.nn.state.attributes import Snapshot
from lightning_revlib.nn.state.base import NOTHING, CallState, StateError
from lightning_revlib.nn.state.tensors import version
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import Treatment

Contexts: TypeAlias = Callable[["CheckpointFrame"], tuple[Any, Any]]


class CheckpointFrame(SavedTensors):
    """A checkpointed call of a step's block on stream b."""

    __slots__ = ("compiler", "input", "lock", "needs_grad", "unpack_input", "version")

    def __init__(self, step: Step, state: CallState, b: Tensor, compiler: Any) -> None:
        super().__init__(step.again(), state)
        self.compiler, self.needs_grad = compiler, b.requires_grad
        # Hooks around the stack say how its input is kept: `save_on_cpu`, or a block that is itself run again.
        pack, unpack = surrounding_hooks() or (None, None)
        self.unpack_input: Any = unpack
        self.input: Any = b.detach() if pack is None else pack(b.detach())
        self.version = version(b)
        self.lock = threading.RLock()  # backward on an accelerator runs in a thread of its own, beside the CPU's

    def record(self, step: Step, b: Tensor, contexts: Contexts | None) -> tuple[Any, Any]:
        """Run the block, leaving autograd with numbers, and return what `step.branch` returns."""
        try:
            first, self.rerun = (NOTHING, NOTHING) if contexts is None else contexts(self)
            with self.hooks(), first:
                out = step.branch(b, self.compiler)
        finally:
            self.end()
        try:
            self.state.close()
        except StateError as error:
            raise errors.of_state(step, error) from error
        return out

    def recompute(self) -> None:
        retain = torch.is_grad_enabled()  # under create_graph
        saved: list[Tensor] = []
        try:
            with self.lock, torch.no_grad():
                self._run_short(saved)
                self.keep(saved, retain)
        except StateError as error:
            raise errors.of_state(self.step, error) from error
        finally:
            saved.clear()  # the second run's graph refers to this list

    def _run_short(self, saved: list[Tensor]) -> None:
        """Run the block again up to the last tensor that backward needs."""
        b = self.input if self.unpack_input is None else self.unpack_input(self.input).detach()
        if self.unpack_input is None and version(b) != self.version:
            raise errors.input_modified(self.step)
        with suppress(Enough), self.state.restore():
            attributes = Snapshot(self.state.modules)
            try:
                self.run_again(b.detach().requires_grad_(self.needs_grad), saved, self.compiler, len(self.sizes))
            except (Enough, Exception):  # compiled code may raise another for it
                if len(saved) < len(self.sizes):
                    raise
                attributes.put_back()  # the block may have been on its way, with others for a while
                raise Enough from None  # so that it is known to have ended early


class Checkpoint(Treatment):
    """Keep the block's input, and run the block again."""

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        return step.run(a, b, self.forward.compiler, partial(self._branch, step))

    def contexts(self) -> Contexts | None:
        """Return what makes the contexts of a call's two runs."""
        context_fn = self.forward.context_fn
        return None if context_fn is None else lambda frame: make_contexts(context_fn)

    def _branch(self, step: Step, b: Tensor, compiler: Any) -> tuple[Any, Any]:
        return CheckpointFrame(step, self.forward.capture(step, b), b, compiler).record(step, b, self.contexts())
