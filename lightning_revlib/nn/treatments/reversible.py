"""Treatment "reversible": steps on a tape, which backward undoes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams, dense
from lightning_revlib.nn.coupling.invertible import Invertible
from lightning_revlib.nn.coupling.standard import Additive
from lightning_revlib.nn.engine import release
from lightning_revlib.nn.engine.chunks import ChunkedUndo, ChunkFrame
from lightning_revlib.nn.engine.invertible import InvertibleFrame
from lightning_revlib.nn.engine.schedule import Batched, Schedule
from lightning_revlib.nn.engine.tape import Frame, Tape
from lightning_revlib.nn.state.tensors import version
from lightning_revlib.nn.steps.chunks import Chunk
from lightning_revlib.nn.steps.step import Step
from lightning_revlib.nn.treatments.base import Treatment
from lightning_revlib.nn.treatments.forward import Forward
from lightning_revlib.nn.treatments.prefetch import Prefetch
from lightning_revlib.nn.treatments.streams import has_streams


class Reversible(Treatment):
    """Keep nothing but the streams after the last step; rebuild the others in backward."""

    tape: Tape  # from the first step on

    def __init__(self, forward: Forward, a: Tensor, b: Tensor) -> None:
        super().__init__(forward, a, b)
        self.last: Frame | None = None
        self.has_entrance = False
        self.entry = a.grad_fn, b.grad_fn

    @classmethod
    def is_possible(cls, step: Step, device: torch.device) -> bool:
        return step.coupling.invertible(step.training)

    def step(self, step: Step, a: Tensor, b: Tensor) -> Streams:
        if self.last is None:
            if a.is_nested and a.layout is torch.strided:
                raise TypeError(
                    f"{step.name} got a nested tensor of the strided layout, which has no shape; make it of the other"
                    " one, torch.nested.nested_tensor(..., layout=torch.jagged), or take treatment 'store'"
                )
            a, b = dense(a), dense(b)
            self.tape = Tape(self.forward.compiler, self.forward.context_fn, self._schedule(a.device))
        index, before = len(self.tape.frames), (version(a), version(b))
        out = step.each(a, b, partial(self._record, step, ChunkedUndo()))
        if not self.has_entrance and self.last is not None and self.last.sizes:  # backward comes so far, no further
            self.has_entrance = True
            if (version(a), version(b)) == before:  # else the coupling works in place
                self.tape.watch(index, self.forward.watch(a, b))
        return out

    def _schedule(self, device: torch.device) -> Schedule:
        if self.forward.overlap and has_streams(device):
            return Prefetch(device)
        return Batched() if self.forward.batched else Schedule()

    def _record(self, step: Step, undoing: ChunkedUndo, a: Tensor, b: Tensor, chunk: Chunk | None) -> Streams:
        state = self.forward.capture(step, b)
        if isinstance(step.coupling, Invertible):
            frame: Frame = InvertibleFrame(self.tape, step, state, a, b)
        elif chunk is None:
            frame = Frame(self.tape, step, state, a, b)
        else:
            frame = ChunkFrame(self.tape, step, state, a, b, chunk, undoing)
        if self.last is not None:
            self.last.keep_next(frame)
        self.last = frame
        return frame.record(step, a, b)

    def pause(self, a: Tensor, b: Tensor) -> None:
        self.tape.keep(tuple, a, b)  # type: ignore[arg-type]

    def close(self, a: Tensor, b: Tensor) -> None:
        self.tape.hold(tuple, a, b, entry=self.entry)  # type: ignore[arg-type]

    def close_joined(self, y: Tensor, halve: Callable[[Tensor, bool], Streams]) -> None:
        assert self.last is not None
        is_large = y.nbytes >= 2 * release.LARGE
        copies = type(self.last.coupling) is not Additive  # of which the inverse only reads the second stream

        def read(outputs: list[Tensor]) -> Streams:
            return halve(outputs[0], copies or (is_large and release.is_sole_owner(outputs[0])))

        self.tape.hold(read, y)
        if is_large:
            release.free_whole_gradient(y)
