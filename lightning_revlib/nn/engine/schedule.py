"""The order in which backward undoes the steps of a tape."""

from __future__ import annotations

from typing import Any

from lightning_revlib.nn.coupling.base import Streams


class Schedule:
    """Steps are undone one by one, when autograd asks for what they saved. Subclasses have other orders."""

    def start(self) -> None:
        """Note that a backward begins at the output."""

    def rewind(self, tape: Any, frame: Any) -> None:
        """Undo steps of the tape down to the frame's."""
        tape.undo_to(frame)


class Batched(Schedule):
    """Steps that save little are undone together: a rewind takes longer than such a step itself.

    This saves a sixth of the overhead for blocks of some microseconds, and holds at most `AT_ONCE` bytes more.
    """

    AT_ONCE = 64 * 1024  # bytes that the steps save, with the streams between them

    def __init__(self) -> None:
        self.before: dict[int, Streams] = {}  # the streams before steps that were undone early, by number

    def start(self) -> None:
        self.before = {}

    def rewind(self, tape: Any, frame: Any) -> None:
        if (before := self.before.get(frame.index)) is not None:  # all was given away, and is asked for again
            frame.undo(before, before=before)
            return
        tape.undo_to(frame)
        self.before = {}
        if not tape.retain:
            self._undo_early(tape, frame)

    def _undo_early(self, tape: Any, frame: Any) -> None:
        """Undo steps below the frame's. One that fails is left, to fail when autograd asks for it, if it ever does."""
        left = self.AT_ONCE - sum(frame.sizes)
        while frame.can_be_early and (below := tape.frame_below(frame)) is not None and below.can_be_early:
            streams = tape.streams
            left -= sum(below.sizes) + streams[0].nbytes
            if left < 0 or not tape.try_to_undo(below):
                return
            self.before[frame.index] = streams
            frame = below
