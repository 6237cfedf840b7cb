"""Checkpointing: a call of a block of which its input is kept, and which runs again when backward needs what it saves.

As `torch.utils.checkpoint` does it (https://arxiv.org/abs/1604.06174), with what the engine has: at a fraction of the
overhead, and with buffers, flags and parameters as they were in forward.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch._dynamo.eval_frame import set_eval_frame

from lightning_revlib.nn.engine.saved_tensors import CallsAutograd, Saved, cannot_run_again, catch, release
from lightning_revlib.nn.state.buffers import Buffers
from lightning_revlib.nn.state.parameters import Settings, version
from lightning_revlib.nn.state.rng import NOTHING, Environment, RandomState
from lightning_revlib.nn.steps.step import Step

around = torch._C._autograd._top_saved_tensors_default_hooks  # the saved-tensor hooks there are, or None

Contexts: TypeAlias = Callable[["Checkpoint"], tuple[Any, Any]]


def checkpoint(step: Step, contexts: Contexts | None, b: Tensor, compiler: Any) -> tuple[Any, Any]:
    """What `step.branch(b, compiler)` returns, checkpointed; `contexts` makes those of its two runs."""
    call = Checkpoint(step, b, compiler)
    try:
        return call.run(b, contexts)
    except CallsAutograd as unexpected:
        if unexpected.args[0] is not call:  # but a call round this one
            raise
        call.take_back(b)
        return Checkpoint(step, b, compiler).run(b, contexts)


class Checkpoint(Saved):
    """A checkpointed call of a step's block on stream b."""

    def __init__(self, step: Step, b: Tensor, compiler: Any) -> None:
        super().__init__(step, b)
        self.compiler = compiler
        # What surrounds the stack says how its input is kept: `save_on_cpu`, or a block that is run again itself.
        pack, self.unpack_input = around(False) or (None, None)
        self.input, self.version = (b.detach(), version(b)) if pack is None else (pack(b.detach()), 0)
        self.keeps_all = step.stack._calls_autograd is not False
        self.settings: Settings = Settings(step.module)
        self.environment = Environment(b)
        self.random = RandomState(b)
        self.buffers = Buffers(self.settings.modules, numbers=step.stack._counts is not False)
        self.lock = threading.RLock()  # backward of an accelerator runs in a thread of its own, beside the CPU's

    def run(self, b: Tensor, contexts: Contexts | None) -> tuple[Any, Any]:
        first, self.again = contexts(self) if contexts else (NOTHING, None)
        arguments = [(t, version(t)) for t in self.step.tensors()]
        catch(self._pack, self._unpack)
        try:
            with first:
                out = self.step.branch(b, self.compiler)
        finally:
            release()
            self.end()
        if self.calls_autograd:
            self.step.stack.__dict__["_calls_autograd"] = True
        self._look(b)
        self.step.check_arguments(arguments)
        self.settings.close([t for t, _ in arguments])
        return out

    def _look(self, b: Tensor) -> None:
        """Keep the generators' states if the call has changed them, and the buffers if there are any."""
        assert self.random is not None
        self.close_buffers()
        self.random = None if RandomState(b).same(self.random) else self.random

    def take_back(self, b: Tensor) -> None:
        """The block has to be run again in forward, keeping what is saved."""
        self.step.stack.__dict__["_calls_autograd"] = True
        self._look(b)
        if (self.buffers and self.buffers.any()) or self.unpack_input is not None:
            raise cannot_run_again(self.step)
        if self.random:
            self.random.set()

    def rewind(self) -> None:
        compiler = set_eval_frame(None)
        try:
            with self.lock:
                b = self.input if self.unpack_input is None else self.unpack_input(self.input).detach()
                if self.unpack_input is None and version(b) != self.version:
                    raise RuntimeError(
                        f"the input of {self.step.name} has been modified by an inplace operation since forward, and"
                        " backward has to run the block on it again; use the operation that is not in-place"
                    )
                if self.environment.changed():
                    with self.environment.again():
                        self._rewind(b)
                else:
                    self._rewind(b)
        finally:
            if compiler is not None:
                set_eval_frame(compiler)

    def _rewind(self, b: Tensor) -> None:
        caught: list[Tensor] = []
        self.keep = torch.is_grad_enabled()  # create_graph
        undo = self.lend(b, self.settings if self.settings.changed() else None)
        try:
            self.run_short(b.data.requires_grad_(self.b_needs_grad), self.compiler, caught, self.settings.modules)
        finally:
            tensors = [*caught]
            caught.clear()  # the second graph refers to this list
            while undo:
                undo.pop()()
        self.give(tensors)
