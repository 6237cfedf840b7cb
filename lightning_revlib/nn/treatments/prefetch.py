"""Overlap: the step before is undone on a stream of its own while the backward of this one runs.

    main   undo n | backward n     | backward n - 1 | ...
    side          | undo n - 1     | undo n - 2     | ...

Small kernels leave a device idle; it has two queues of them here, and holds what two steps have saved, not one. The
idea is PaReprop's, https://arxiv.org/abs/2306.09342. What makes it right at every depth:

1. Side waits for main before it begins: all that it reads has been written, and memory of its own pool that main has
   used and freed is no longer in use.
2. Main waits for side when autograd asks for the step, and before anything that side uses may be freed.
3. The streams that side reads are kept until then, as main may have allocated them, and would use their memory again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_revlib.nn.coupling.base import Streams
from lightning_revlib.nn.engine.schedule import Schedule
from lightning_revlib.nn.engine.tape import Frame, Tape
from lightning_revlib.nn.treatments.streams import side_stream


class Prefetch(Schedule):
    """Undo one step more than autograd has asked for, on a side stream."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.module = device, torch.get_device_module(device)
        self.side = side_stream(self.module, device, "overlap")
        self.main: Any = None  # the stream that has yet to wait for side
        self.index = -1  # of the step that was undone ahead; a frame would refer to this
        self.recomputed: list[Tensor | None] | None = None  # what the step saves
        self.above: Streams | None = None  # the streams that it was undone from: those before the step above it

    def start(self) -> None:
        self.wait()
        self.recomputed = self.above = None

    def rewind(self, tape: Tape, frame: Frame) -> None:
        self.wait()
        if self.recomputed is not None and self.index == frame.index:  # it was undone ahead
            frame.put_recomputed(self.recomputed)
            frame.release_next()
        elif self.above is not None and self.index == frame.index - 1 == tape.position:  # only the step below it was
            frame.undo(self.above, before=self.above)  # what it saves was given away, and is asked for again
            return
        else:
            tape.undo_to(frame)
        self.recomputed = self.above = None
        if tape.position == frame.index and not tape.retain:
            self._undo_ahead(tape, frame)

    def _undo_ahead(self, tape: Tape, frame: Frame) -> None:
        """Begin to undo the step before the frame's, if autograd can ask for it."""
        before = tape.frame_below(frame)
        main = self.module.current_stream(self.device)
        if before is None or not (before.can_be_early and frame.can_be_early) or main == self.side:
            return
        self.main, self.above = main, tape.streams
        self.side.wait_stream(main)
        with self.module.stream(self.side):
            tape.undo(before)
        self.index, self.recomputed = before.index, before.take_recomputed()

    def wait(self) -> None:
        """From here on, main may use and free what side has used."""
        if self.main is not None:
            self.main.wait_stream(self.side)
            self.main = None

    def __del__(self) -> None:
        self.wait()
