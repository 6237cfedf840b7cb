"""One step of one forward on the tape: what autograd saves in it, and how it is run again. See `tape` for the whole."""

from __future__ import annotations

import weakref
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.coupling.base import Coupling, Streams
from lightning_revlib.nn.coupling.standard import Additive
from lightning_revlib.nn.engine.norm_outputs import Norms
from lightning_revlib.nn.engine.saved_tensors import Saved, collect
from lightning_revlib.nn.state.parameters import parts
from lightning_revlib.nn.state.rng import Environment, RandomState

if TYPE_CHECKING:
    from lightning_revlib.nn.engine.tape import Tape
    from lightning_revlib.nn.steps.chunks import Chunk


class Frame(Saved):
    """One step of one forward, and what it takes to run it again."""

    __slots__ = (
        "a_needs_grad", "above", "below", "chunk", "coupling", "environment", "index", "norms", "saved_by_block",
        "stride", "tape",
    )  # fmt: skip
    # All are set by a `Recording`.
    tape: Tape
    index: int
    above: Frame | None
    below: weakref.ref[Frame] | None  # if steps are undone ahead
    chunk: Chunk | None  # if the step is done chunk by chunk, and this is one
    environment: Environment | None  # if it is another than the tape's
    norms: Norms | None  # those of the second run, if its tensors are large
    stride: tuple[int, ...]  # stream b's
    a_needs_grad: bool
    coupling: Coupling  # bound to this step
    saved_by_block: int  # how many of them; the coupling saved the others

    def replay(self, b: Tensor, out: Streams, a: Tensor | None = None) -> Tensor:
        """Run the step again on stream b, catching, and return stream a, found from the streams after the step."""
        step, tape = self.step, self.tape
        caught: list[Tensor] = []
        pack: Any = partial(collect, caught, -1) if self.calls_autograd else caught.append
        unpack = caught.__getitem__
        settings = self.settings
        changed = tape.changed if settings is None else settings if settings.changed() else None
        undo = self.lend(b, changed) if changed or self.buffers or self.random else []
        norms, at_least = None, tape.norms_from
        if at_least is not None and sum(self.saved) > at_least and not (tape.keep or changed or tape.compiler):
            norms = Norms(step.module)
            undo.append(norms.watch())
        try:
            # Laid out as in forward, and requiring grad as in forward: else the block would save other tensors.
            same = b if b.stride() == self.stride else b.new_empty_strided(b.shape, self.stride).copy_(b)
            again = same.data.requires_grad_(self.b_needs_grad)  # which counts its changes by itself
            if a is None and tape.arrived is None and self._is_last_asked():
                self.run_short(again, tape.compiler, caught, parts(step.module))
                a = b  # stands for a stream that nobody asks for
            else:
                f, _ = self.run_again(again, tape.compiler, pack, unpack)
            if a is None:
                usual = type(self.coupling) is Additive  # which is known to change none in place
                counts = None if usual else (out[0]._version, out[1]._version)
                a = self.coupling.inverse(*out, b, f)
                if counts is not None and (out[0]._version, out[1]._version) != counts:
                    raise RuntimeError(
                        f"{step.name}: the inverse of its coupling, {self.coupling}, changes a stream in place, which"
                        " the next block may still need; use the operation that is not in-place, such as out - f"
                    )
                if a.requires_grad:  # it is f itself
                    a = a.detach()
            if len(self.saved) > self.saved_by_block:  # the coupling saves tensors, too
                with torch.enable_grad(), saved_tensors_hooks(pack, unpack):
                    self.coupling.forward(a.data.requires_grad_(self.a_needs_grad), again, f)
        finally:
            tensors = [*caught]
            caught.clear()  # the second graph refers to this list
            while undo:
                undo.pop()()
        self.keep = tape.keep
        self.norms = None
        if norms is not None and not self.calls_autograd:
            norms.forget(tensors)  # type: ignore[arg-type]
            self.norms = norms
        self.give(tensors)
        return a

    def _is_last_asked(self) -> bool:
        """Whether backward needs what the block has saved, and nothing else from here on."""
        tape = self.tape
        return not (self.index or self.chunk or self.calls_autograd or tape.keep or tape.ahead) and (
            len(self.saved) == self.saved_by_block
        )

    def repeat(self, a: Tensor, b: Tensor) -> Streams:
        """The step's forward again, without graph or trace, to learn whether it draws."""
        random, undo = RandomState(b), self.lend(b, self.tape.changed)
        try:
            f, _ = self.step.branch(b, self.tape.compiler)
            self.step.bind(a, b)  # it may draw, too
            streams = self.coupling.forward(a, b, f)
        finally:
            while undo:
                undo.pop()()
        self.random = None if RandomState(b).same(random) else random
        return streams

    def _find(self, number: int) -> Tensor:
        if self.norms and (tensor := self.norms.again(number)) is not None:
            return tensor
        if self.kept is not None:
            return super()._find(number)
        if self.changed is not None:
            self.check_unchanged(number)
        self.tape.rewind(self)
        return self._unpack(number)

    def rewind(self) -> None:
        self.tape.rewind(self)
