"""Frames of a step by chunks: each runs the block again for its own chunk of the streams."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine.tape import Frame, Tape
from lightning_revlib.nn.state.base import CallState
from lightning_revlib.nn.steps.chunks import Chunk
from lightning_revlib.nn.steps.step import Step


class ChunkedUndo:
    """The streams before a step while its chunks are undone, the last one first.

    The tape keeps the streams after the step meanwhile, which all chunks are undone from.
    """

    def __init__(self) -> None:
        self.before: Streams | None = None

    def put(self, chunk: Chunk, out: Streams, after: Streams, before: Streams) -> None:
        """Take the streams before one chunk, found from the chunk `after` the step, of `out`."""
        if self.before is None or chunk.is_last:  # a backward that failed may have left some
            # The coupling may have returned the stream that came out, for all chunks alike.
            b = out[0] if before[1] is after[0] else torch.empty_like(out[0])
            self.before = torch.empty_like(out[1]), b
        for whole, part in zip(self.before, before, strict=True):
            if whole is not out[0]:
                chunk.of(whole).copy_(part)

    def take(self) -> Streams:
        assert self.before is not None
        before, self.before = self.before, None
        return before


class ChunkFrame(Frame):
    """One chunk of a step. `undoing` is shared by the step's chunks."""

    __slots__ = ("chunk", "undoing")
    can_be_early = False

    def __init__(
        self, tape: Tape, step: Step, state: CallState, a: Tensor, b: Tensor, chunk: Chunk, undoing: ChunkedUndo
    ) -> None:
        super().__init__(tape, step, state, a, b)
        self.chunk, self.undoing = chunk, undoing

    def undo(self, out: Streams, before: Streams | None = None) -> Streams:
        chunk = self.chunk
        if before is not None:
            whole = before if self.undoing.before is None else self.undoing.before
            super().undo(out, (chunk.of(whole[0]), chunk.of(whole[1])))
            return before
        after = chunk.of(out[0]), chunk.of(out[1])
        self.undoing.put(chunk, out, after, super().undo(after))
        return out if chunk.number else self.undoing.take()
