"""One step of one forward on the tape: what autograd saves in it, and how it is run again. See `tape` for the whole."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, clear_autocast_cache
from torch._dynamo.eval_frame import skip_code
from torch.autograd.graph import saved_tensors_hooks

from lightning_revlib.nn.buffers import Buffers
from lightning_revlib.nn.coupling import Coupling, Streams
from lightning_revlib.nn.norms import Norms
from lightning_revlib.nn.replay import RandomState
from lightning_revlib.nn.settings import parts

if TYPE_CHECKING:
    from lightning_revlib.nn.chunks import Chunk
    from lightning_revlib.nn.step import Step
    from lightning_revlib.nn.tape import Tape

# What `saved_tensors_hooks` and `torch.enable_grad` do, without an object and calls for each: six microseconds a step.
catch = torch._C._autograd._push_saved_tensors_default_hooks
release = torch._C._autograd._pop_saved_tensors_default_hooks
set_grad_enabled = torch._C._set_grad_enabled

# By `map`, attributes of many tensors are read without interpreting a line for each.
NBYTES, VERSION = attrgetter("nbytes"), attrgetter("_version")


class CallsAutograd(BaseException):
    """The frame's block does so in its forward, and what it needs has been let go. Not for blocks to catch."""


class Frame:
    """One step of one forward, and what it takes to run it again."""

    # Class attributes are what most frames have: they are not set in each.
    above: Frame | None = None
    below: weakref.ref[Frame] | None = None  # set if steps are undone ahead
    chunk: Chunk | None = None  # set if the step is done chunk by chunk, and this is one
    random: RandomState | None = None  # set if the step draws
    buffers: Buffers | None = None  # set if it changes any
    again: Any = None  # the second run's context
    calls_autograd = False  # the block does, itself
    keeps_all = True  # that its forward saves, until it ends, for such blocks; else what is fresh is let go at once
    changed: torch.Size | None = None  # the shape of a tensor that was modified after it was saved
    norms: Norms | None = None  # those of the second run, if its tensors are large
    caught: list[Tensor | None] | None = None  # what the second run has saved, each until it is asked for
    coupling: Coupling  # bound to this step
    saved_by_block: int  # how many of them; the coupling saved the others

    def __init__(self, tape: Tape, index: int, step: Step, a: Tensor, b: Tensor) -> None:
        self.tape, self.index, self.step, self.stride = tape, index, step, b.stride()
        self.a_needs_grad, self.b_needs_grad = a.requires_grad, b.requires_grad
        self.saved: list[int] = []  # the bytes of each tensor that autograd wanted to save
        self.versions: list[int] = []  # their versions at that time
        self.kept: list[Tensor] | None = []  # all until the step ends, or those that have been changed before

    def replay(self, b: Tensor, out: Streams, a: Tensor | None = None) -> Tensor:
        """Run the step again on stream b, catching, and return stream a, found from the streams after the step."""
        step, tape = self.step, self.tape
        caught: list[Tensor] = []
        pack: Any = partial(_append, caught) if self.calls_autograd else caught.append
        unpack = caught.__getitem__
        undo = self._lend(b) if tape.settings_changed or self.buffers or self.random else []
        norms = None
        at_least, usual = tape.norms_from, not (tape.keep or tape.settings_changed or tape.compiler)
        if at_least is not None and usual and sum(self.saved) > at_least:
            norms = Norms(step.module)
            undo.append(norms.watch())
        try:
            # Laid out as in forward, and requiring grad as in forward: else the block would save other tensors.
            same = b if b.stride() == self.stride else b.new_empty_strided(b.shape, self.stride).copy_(b)
            again = same.data.requires_grad_(self.b_needs_grad)  # which counts its changes by itself
            catch(pack, unpack)
            set_grad_enabled(True)
            try:
                f, _ = self._branch(again, self.again) if self.again else step.branch(again, tape.compiler)
            finally:
                set_grad_enabled(False)
                release()
                clear_autocast_cache()  # backward may be called within autocast, which would keep what was cast
            if a is None:
                a = self.coupling.inverse(*out, b, f)
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
        if list(map(VERSION, tensors)) != self.versions:  # of what was fresh; buffers may be others than in forward
            pairs = zip(tensors, self.versions)  # noqa: B905
            self.changed = next((t.shape for t, v in pairs if t._version and not v), self.changed)
        if self.changed is not None or list(map(NBYTES, tensors)) != self.saved:
            self._complain(tensors)
        self.caught, self.norms = tensors, None  # type: ignore[assignment]
        if norms is not None and not self.calls_autograd:
            norms.forget(self.caught)  # type: ignore[arg-type]
            self.norms = norms
        return a

    def _branch(self, b: Tensor, context: Any) -> tuple[Any, Any]:
        with context:
            return self.step.branch(b, self.tape.compiler)

    def repeat(self, a: Tensor, b: Tensor) -> Streams:
        """The step's forward again, without graph or trace, to learn whether it draws."""
        random, undo = RandomState(b), self._lend(b)
        try:
            f, _ = self.step.branch(b, self.tape.compiler)
            self.step.bind(a, b)  # it may draw, too
            streams = self.coupling.forward(a, b, f)
        finally:
            while undo:
                undo.pop()()
        self.random = None if RandomState(b).same(random) else random
        return streams

    def _lend(self, b: Tensor) -> list[Callable[[], Any]]:
        undo = self.tape.settings.lend(parts(self.step.module)) if self.tape.settings_changed else []
        if self.buffers:
            undo.append(self.buffers.lend(self.tape.scratch))
        if self.random:
            undo.append(self.random.lend(b))
        return undo

    def _pack(self, tensor: Tensor) -> int:
        assert self.kept is not None
        self.saved.append(tensor.nbytes)
        self.versions.append(version := tensor._version)
        if version or self.keeps_all:
            self.kept.append(tensor)
        return len(self.saved) - 1

    def end(self) -> None:
        """Behind the step in forward: look whether what is kept has been changed. What was fresh: in the second run."""
        kept, self.kept = self.kept, None
        assert kept is not None
        versions = self.versions if self.keeps_all else list(filter(None, self.versions))
        if list(map(VERSION, kept)) != versions:
            self.changed = next(t.shape for t, v in zip(kept, versions, strict=True) if t._version != v)

    def _unpack(self, number: int) -> Tensor:
        caught = self.caught
        if caught is None or (tensor := caught[number]) is None:
            return self._find(number)
        if not self.tape.keep:
            caught[number] = None
        return tensor

    def _find(self, number: int) -> Tensor:
        """What autograd asks for where nothing is caught, or no more."""
        if self.kept is not None:
            if not self.keeps_all:
                raise CallsAutograd(self)
            self.calls_autograd = True
            return self.kept[number]
        if self.norms and (tensor := self.norms.again(number)) is not None:
            return tensor
        self.tape.rewind(self)
        return self._unpack(number)

    def _complain(self, again: list[Tensor]) -> None:
        if self.changed is not None:
            raise RuntimeError(
                f"{self.step.name}: a tensor of shape {list(self.changed)} needed for its gradient has been modified by"
                " an inplace operation inside the block; use the operation that is not in-place"
            )
        pairs = enumerate(zip(self.saved, again))  # noqa: B905
        lines = [
            f"{self.step.name} computes something else in backward than it did in forward: it saved"
            f" {len(self.saved)} tensors for its gradient, and {len(again)} when recomputed.",
            *[f"  {i}: saved {x:,} bytes, recomputed {_show(t)}" for i, (x, t) in pairs if x != t.nbytes][:3],
            "A block must depend on its input, arguments, parameters, registered buffers and torch's generators only.",
        ]
        raise RuntimeError("\n".join(lines))


def _show(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}, {tensor.nbytes:,}"


def _append(tensors: list[Tensor], tensor: Tensor) -> int:
    tensors.append(tensor)
    return len(tensors) - 1


# Autograd calls these while a compiled block runs: they are not to be compiled themselves.
for function in (Frame._pack, Frame._unpack, _append):
    skip_code(function.__code__)
